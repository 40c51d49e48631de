"""The report of a comparison: one page of HTML that needs no network, JSON, and JUnit for CI."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader
from junitparser import Failure, JUnitXml, TestCase, TestSuite
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loadtests.compare import SIDES, Results, errors_of, ratios, settings_of, verdict
from loadtests.requirements import Requirement
from loadtests.run import LEAST_REQUESTS
from loadtests.statistics import Ratio

COLOURS = {"A": "#888888", "B": "#1f77b4"}
LAYOUT: dict[str, Any] = {"template": "plotly_white", "height": 360, "margin": {"l": 60, "r": 20, "t": 50, "b": 50}}
CONFIG = {"responsive": True, "displayModeBar": False}
LOG = {"type": "log", "dtick": "D2", "tickformat": "~g"}
"""An axis of times: the slowest are many times the usual ones."""
ROWS = {
    "goodput_ratio": "requests/s within the promise",
    "tokens_per_second_ratio": "output tokens/s there",
    "ttft_p50_ratio": "time to first token, median",
    "ttft_p95_ratio": "time to first token, p95",
    "itl_p50_ratio": "inter-token latency, median",
    "itl_p95_ratio": "inter-token latency, p95",
    "tpot_p50_ratio": "time per output token, median",
    "tpot_p95_ratio": "time per output token, p95",
    "latency_p50_ratio": "whole answer, median",
    "latency_p95_ratio": "whole answer, p95",
    "kv_cache_usage_ratio": "part of the KV cache in use",
    "kv_capacity_ratio": "KV-cache capacity, tokens",
}


def write(results: Results, folder: Path, requirements: Sequence[Requirement], command: str) -> list[str]:
    """Write report.html, report.json and junit.xml into `folder`; returns why requirements are not met."""
    rows = {profile: ratios(results, profile) for profile in results.plan.profiles}
    judged = [(each, each.failures(rows)) for each in requirements]
    (folder / "report.html").write_text(_page(results, rows, judged, command))
    (folder / "report.json").write_text(json.dumps(_plain(_document(results, rows, judged, command)), indent=1) + "\n")
    _junit(results, judged).write(str(folder / "junit.xml"), pretty=True)
    return [f"{profile}: {why}" for _, failures in judged for profile, why in failures.items() if why]


def _document(results: Results, rows: dict[str, dict[str, Ratio]], judged: list[Any], command: str) -> dict[str, Any]:
    return {
        "command": command,
        "sides": results.described,
        "versions": results.versions,
        "settings": settings_of(results.plan),
        "kv_capacity_tokens": results.capacity,
        "profiles": {
            profile: {
                "verdict": verdict(results, profile, found),
                "ratios": {name: asdict(each) | {"differs": each.differs} for name, each in found.items()},
                "saturation_requests_per_second": results.saturation[profile],
                "quantiles": results.distributions.get(profile, {}),
            }
            for profile, found in rows.items()
        },
        "requirements": {each.text: failures for each, failures in judged},
        "runs": [asdict(point) for point in results.points],
        "metrics": results.samples,
    }


def _plain(value: Any) -> Any:
    """With null for what is no number, as JSON wants it."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _junit(results: Results, judged: list[tuple[Requirement, dict[str, str]]]) -> JUnitXml:
    suite = TestSuite("loadtest compare")
    for profile in results.plan.profiles:
        case = TestCase("answers without errors", profile)
        counts = errors_of([point for point in results.points if point.profile == profile])
        if counts:
            case.result = [Failure(", ".join(f"{kind}: {count}" for kind, count in counts.items()))]
        suite.add_testcase(case)
    for requirement, failures in judged:
        for profile, why in failures.items():
            case = TestCase(requirement.text, profile)
            if why:
                case.result = [Failure(why)]
            suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    return document


def _page(results: Results, rows: dict[str, dict[str, Ratio]], judged: list[Any], command: str) -> str:
    pages = Environment(loader=PackageLoader("loadtests"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    plots = {profile: _profile_plots(results, profile) for profile in rows}
    return pages.get_template("compare.html.j2").render(
        results=results,
        plan=results.plan,
        least_requests=LEAST_REQUESTS,
        verdicts={profile: verdict(results, profile, found) for profile, found in rows.items()},
        rows=rows,
        titles=ROWS,
        levels={profile: _levels(results, profile) for profile in rows},
        judged=judged,
        errors=errors_of(results.points),
        unsteady=[point for point in results.points if not point.figures.steady and not point.figures.given_up],
        early=sum(point.figures.given_up for point in results.points),
        plots={
            profile: {name: _html(figure, f"{name}-{profile}") for name, figure in figures.items()}
            for profile, figures in plots.items()
        },
        over_time={name: _html(figure, name) for name, figure in _time_plots(results).items()},
        plotly=Markup(get_plotlyjs()),
        command=command,
        settings=json.dumps(_plain(settings_of(results.plan)), indent=1),
    )


def _html(figure: go.Figure, name: str) -> Markup:
    return Markup(figure.to_html(full_html=False, include_plotlyjs=False, div_id=name, config=CONFIG))


def _levels(results: Results, profile: str) -> dict[str, dict[str, float]]:
    """Both sides' figures behind the ratios: geometric means over rounds for rates, medians for times, in seconds."""
    found: dict[str, dict[str, float]] = {}
    for side in SIDES:
        points = [p for p in results.points if (p.side, p.profile, p.kind) == (side, profile, "level")]
        row = {"goodput_ratio": float(np.exp(np.mean(np.log(results.saturation[profile][side]))))}
        for name in ("ttft", "itl", "tpot", "latency"):
            for place, quantile in enumerate(("p50", "p95")):
                values = [getattr(point.figures, name)[place] for point in points]
                row[f"{name}_{quantile}_ratio"] = float(np.median(values))
        row["kv_cache_usage_ratio"] = float(np.mean([point.kv_cache_usage for point in points]))
        row["kv_capacity_ratio"] = results.capacity.get(side, math.nan)
        found[side] = row
    return found


def _profile_plots(results: Results, profile: str) -> dict[str, go.Figure]:
    throughput, goodput = go.Figure(), go.Figure()
    ttft, itl = go.Figure(), go.Figure()
    for side in SIDES:
        points = [point for point in results.points if (point.side, point.profile) == (side, profile)]
        points.sort(key=lambda point: point.figures.rate)
        look = {"name": side, "mode": "markers", "marker": {"color": COLOURS[side], "size": 8}}
        rates = [point.figures.rate for point in points]
        throughput.add_scatter(
            x=[point.figures.tokens_per_second for point in points], y=[p.figures.ttft[1] for p in points], **look
        )
        goodput.add_scatter(x=rates, y=[point.figures.good for point in points], **look)
        goodput.add_vline(
            x=float(np.exp(np.mean(np.log(results.saturation[profile][side])))),
            line={"color": COLOURS[side], "dash": "dot"},
        )
        quantiles = results.distributions[profile][side]
        for figure, kind in ((ttft, "ttft"), (itl, "itl")):
            if quantiles[kind]:
                grid = np.linspace(0, 1, len(quantiles[kind]))
                figure.add_scatter(x=quantiles[kind], y=grid, name=side, mode="lines", line_color=COLOURS[side])
    objective = results.plan.objective
    throughput.add_hline(y=objective.ttft, line_dash="dash")
    goodput.add_hline(y=objective.goodput, line_dash="dash")
    ttft.add_vline(x=objective.ttft, line_dash="dash")
    itl.add_vline(x=objective.itl, line_dash="dash")
    throughput.update_layout(
        title=f"{profile}: throughput against latency",
        xaxis_title="output tokens/s",
        yaxis={"title": "TTFT p95, s", **LOG},
        **LAYOUT,
    )
    goodput.update_layout(
        title=f"{profile}: goodput curve",
        xaxis_title="requests/s sent",
        yaxis_title="part within the promise",
        **LAYOUT,
    )
    equal = "at equal load"
    for figure, name, of in ((ttft, "TTFT", "requests"), (itl, "ITL", "gaps")):
        title = f"{profile}: {name} {equal}"
        figure.update_layout(title=title, xaxis={"title": "s", **LOG}, yaxis_title=f"part of {of}", **LAYOUT)
    return {"throughput": throughput, "goodput": goodput, "ttft": ttft, "itl": itl}


def _time_plots(results: Results) -> dict[str, go.Figure]:
    kv, queue = go.Figure(), go.Figure()
    start = min((sample["time"] for samples in results.samples.values() for sample in samples), default=0.0)
    for side, samples in results.samples.items():
        times = [sample["time"] - start for sample in samples]
        colour = COLOURS[side]
        kv.add_scatter(
            x=times, y=[s.get("kv_cache_usage") for s in samples], name=side, mode="lines", line_color=colour
        )
        for name, dash in (("running", "solid"), ("waiting", "dot")):
            values = [sample.get(name) for sample in samples]
            line = {"color": colour, "dash": dash}
            queue.add_scatter(x=times, y=values, name=f"{side}, {name}", mode="lines", line=line)
    kv.update_layout(title="KV cache in use", xaxis_title="s", yaxis_title="part", **LAYOUT)
    queue.update_layout(title="Requests running and waiting", xaxis_title="s", yaxis_title="requests", **LAYOUT)
    return {"kv": kv, "queue": queue}
