"""`vllm-ext doctor`."""

import typer

app = typer.Typer()


@app.command("doctor")
def doctor() -> None:
    """Say what is installed and supported here; exit with 1, and the cure, where something is wrong."""
    from vllm_ext.doctor import examine

    raise typer.Exit(0 if examine() else 1)
