"""The `vllm-ext` command."""

import typer

from vllm_ext.cli.bench import app as bench_app
from vllm_ext.cli.doctor import app as doctor_app
from vllm_ext.cli.heads import app as heads_app
from vllm_ext.cli.loadtest import app as loadtest_app
from vllm_ext.cli.model import app as model_app
from vllm_ext.cli.plan import app as plan_app
from vllm_ext.cli.probe import app as probe_app
from vllm_ext.cli.quality import app as quality_app
from vllm_ext.cli.serve import app as serve_app
from vllm_ext.errors import told_in_one_line

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(model_app, name="model")
app.add_typer(heads_app, name="heads")
app.add_typer(serve_app)
app.add_typer(plan_app)
app.add_typer(probe_app)
app.add_typer(quality_app)
app.add_typer(bench_app)
app.add_typer(doctor_app)
app.add_typer(loadtest_app, name="loadtest")


def main() -> None:
    """Run the command; a user's mistake is one line and exit code 2."""
    with told_in_one_line():
        app()


if __name__ == "__main__":
    main()
