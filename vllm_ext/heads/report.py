"""What a conversion came to: the loss, and how often the head is right and unsure, as pictures and a page."""

import json
import platform
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Picture

from vllm_ext.heads.calibration import TOPS
from vllm_ext.reports.pages import write_page, write_picture


def write(provenance: dict[str, Any], model: str, curve: Path, out: Path, command: Sequence[str]) -> Path:
    """Write `curve.png`, `calibration.png` and `report.html` into the folder `out`; returns the last.

    `curve` is the file that training wrote, a JSON object a line.
    """
    out.mkdir(parents=True)
    points = [json.loads(line) for line in curve.read_text(encoding="utf-8").splitlines()]
    pictures = {"curve": write_picture(curve_picture(points), out / "curve.png")}
    if provenance["calibration"]:
        picture = calibration_picture(provenance["calibration"], provenance["judged"])
        pictures["calibration"] = write_picture(picture, out / "calibration.png")
    file = out / "report.html"
    write_page(
        "conversion.html.j2",
        file,
        header={
            "model": model,
            "machine": platform.machine(),
            "versions": provenance["versions"],
            "settings": provenance["training"],
        },
        provenance=provenance,
        pictures=pictures,
        tops=TOPS,
        command=shlex.join(command),
    )
    return file


def curve_picture(points: Sequence[dict[str, float]]) -> Picture:
    """The loss of the steps that were logged."""
    picture = Picture(figsize=(7, 3.2), layout="constrained")
    panel = picture.subplots()
    panel.plot([point["step"] for point in points], [point["loss"] for point in points])
    panel.set_xlabel("step")
    panel.set_ylabel("loss, nats a token")
    panel.set_ylim(bottom=0)
    return picture


def calibration_picture(settings: Sequence[dict[str, Any]], judged: dict[str, dict[str, float]]) -> Picture:
    """How many rows fall back for an agreement."""
    picture = Picture(figsize=(7, 3.2), layout="constrained")
    panel = picture.subplots()
    for kind in dict.fromkeys(each["head"] for each in settings):
        own = {(each["reached"], each["fallback"]) for each in settings if each["head"] == kind}
        points = sorted({(judged[kind]["agreement"], 0.0)} | own)
        panel.plot(
            [100 * reached for reached, _ in points], [100 * fallback for _, fallback in points], "o-", label=kind
        )
    panel.legend()
    panel.set_xlabel("top token as the teacher's, %")
    panel.set_ylabel("rows that fall back, %")
    return picture
