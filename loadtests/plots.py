"""The report's plots: readable on light and dark ground, and on a phone."""

from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from loadtests.results import Results
from loadtests.threshold import SIDES

COLOURS = {"A": "#d08000", "B": "#2f80ed"}
GREY, LINES = "#808080", "rgba(128,128,128,0.25)"
AXIS = {"gridcolor": LINES, "zerolinecolor": LINES, "linecolor": LINES, "automargin": True}
LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": GREY},
    "height": 340,
    "margin": {"l": 50, "r": 10, "t": 60, "b": 45},
    "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
    "title": {"y": 0.98, "yanchor": "top"},
}
CONFIG = {"responsive": True, "displayModeBar": False}
LOG = {"type": "log", "dtick": "D2", "tickformat": "~g"}
"""An axis of times: the slowest are many times the usual ones."""


def html(figure: go.Figure, name: str) -> Markup:
    """The plot, as a part of a page that has plotly already."""
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=CONFIG))


def plots_of_workload(results: Results, workload: str) -> dict[str, go.Figure]:
    """Of all its runs, and of answers at equal load."""
    throughput, goodput, ttft, itl = (go.Figure() for _ in range(4))
    for side in SIDES:
        points = sorted(results.runs(workload, side), key=lambda point: point.figures.rate)
        look = {"mode": "markers", "marker": {"color": COLOURS[side], "size": 8, "symbol": "circle"}}
        throughput.add_scatter(
            x=[point.figures.tokens_per_second for point in points],
            y=[point.figures.ttft[1] for point in points],
            name=side,
            **look,
        )
        rates, good = [point.figures.rate for point in points], [point.figures.good for point in points]
        symbols = ["circle" if point.held else "x" for point in points]
        goodput.add_scatter(
            x=rates, y=good, name=side, mode="markers", marker={"color": COLOURS[side], "size": 9, "symbol": symbols}
        )
        goodput.add_vline(x=results.served[workload][side], line={"color": COLOURS[side], "dash": "dot"})
        quantiles = results.distributions.get(workload, {}).get(side, {})
        for figure, kind in ((ttft, "ttft"), (itl, "itl")):
            if quantiles.get(kind):
                grid = np.linspace(0, 1, len(quantiles[kind]))
                figure.add_scatter(x=quantiles[kind], y=grid, name=side, mode="lines", line_color=COLOURS[side])
    objective = results.plan.objective
    throughput.add_hline(y=objective.ttft, line_dash="dash", line_color=GREY)
    goodput.add_hline(y=objective.goodput, line_dash="dash", line_color=GREY)
    ttft.add_vline(x=objective.ttft, line_dash="dash", line_color=GREY)
    itl.add_vline(x=objective.itl, line_dash="dash", line_color=GREY)
    _lay_out(throughput, "Throughput against latency", "output tokens/s", "TTFT p95, s", y=LOG)
    _lay_out(goodput, "Runs: within the promise (×: did not hold)", "requests/s sent", "part")
    _lay_out(ttft, "Time to first token at equal load", "s", "part of requests", x=LOG)
    _lay_out(itl, "Inter-token latency at equal load", "s", "part of gaps", x=LOG)
    return {"goodput": goodput, "throughput": throughput, "ttft": ttft, "itl": itl}


def plots_of_time(results: Results) -> dict[str, go.Figure]:
    """Of the servers' metrics."""
    kv, queue = go.Figure(), go.Figure()
    start = min((sample["time"] for samples in results.samples.values() for sample in samples), default=0.0)
    for side, samples in results.samples.items():
        times = [sample["time"] - start for sample in samples]
        usage = [sample.get("kv_cache_usage") for sample in samples]
        kv.add_scatter(x=times, y=usage, name=side, mode="lines", line_color=COLOURS[side])
        for name, dash in (("running", "solid"), ("waiting", "dot")):
            values = [sample.get(name) for sample in samples]
            line = {"color": COLOURS[side], "dash": dash}
            queue.add_scatter(x=times, y=values, name=f"{side}, {name}", mode="lines", line=line)
    _lay_out(kv, "KV cache in use", "s", "part")
    _lay_out(queue, "Requests running and waiting", "s", "requests")
    return {"kv": kv, "queue": queue}


def _lay_out(figure: go.Figure, title: str, x_title: str, y_title: str, **axes: dict[str, Any]) -> None:
    figure.update_layout(
        xaxis=AXIS | {"title": x_title} | axes.get("x", {}),
        yaxis=AXIS | {"title": y_title} | axes.get("y", {}),
        **LAYOUT | {"title": LAYOUT["title"] | {"text": title, "font": {"size": 14}}},
    )
