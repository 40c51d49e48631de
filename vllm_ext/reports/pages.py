"""Reports as one page of HTML that holds its pictures: readable on any machine, with no network."""

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader
from matplotlib.figure import Figure as Picture


def write_page(template: str, file: Path, **values: Any) -> None:
    """Fill a template of `templates/`."""
    pages = Environment(loader=PackageLoader("vllm_ext.reports"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    file.write_text(pages.get_template(template).render(**values), encoding="utf-8")


def write_picture(picture: Picture, file: Path) -> str:
    """Write the PNG, and return it as a page can hold it."""
    drawn = BytesIO()
    picture.savefig(drawn, format="png", dpi=130)
    file.write_bytes(drawn.getvalue())
    return "data:image/png;base64," + base64.b64encode(drawn.getvalue()).decode()
