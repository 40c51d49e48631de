"""The report of a comparison: one page of HTML that needs no network, JSON, and JUnit for CI.

report.json is as `report.schema.json` says, which lies beside this file.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from junitparser import Failure, JUnitXml, TestCase, TestSuite
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from loadtests import verdict
from loadtests.plots import html, plots_of_time, plots_of_workload
from loadtests.requirements import Requirement
from loadtests.results import Results, errors_of
from loadtests.run import LEAST_REQUESTS
from loadtests.statistics import Ratio
from loadtests.threshold import SIDES

SCHEMA = 3
ROWS = {
    "goodput_ratio": "requests/s within the promise",
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
    """Write report.html, report.json and junit.xml into `folder`; returns why requirements are not met.

    Each file is replaced at once, so that a process that is ended meanwhile leaves a whole one.
    """
    rows = {workload: verdict.ratios(results, workload) for workload in results.gain}
    of_all = {workload: rows.get(workload, {}) for workload in results.plan.workloads}
    judged = [(each, each.failures(of_all)) for each in requirements]
    document = json.dumps(_plain(_document(results, rows, judged, command)), indent=1) + "\n"
    _replace(folder / "report.json", document.encode())
    _replace(folder / "report.html", _page(results, rows, judged, command).encode())
    _junit(results, judged).write(junit := io.BytesIO(), pretty=True)
    _replace(folder / "junit.xml", junit.getvalue())
    return [f"{workload}: {why}" for _, failures in judged for workload, why in failures.items() if why]


def _replace(file: Path, content: bytes) -> None:
    new = file.with_name(f".{file.name}.new")
    try:
        new.write_bytes(content)
        new.replace(file)
    finally:
        new.unlink(missing_ok=True)


def _document(results: Results, rows: dict[str, dict[str, Ratio]], judged: list[Any], command: str) -> dict[str, Any]:
    workloads = {}
    for workload, found in rows.items():
        needles = verdict.needles_of(results, workload)
        workloads[workload] = {
            "verdict": verdict.verdict(results, workload),
            "quality": verdict.quality(results, workload),
            "ratios": {name: asdict(each) | {"differs": each.differs} for name, each in found.items()},
            "served_requests_per_second": results.served[workload],
            "needles": needles and {"right": needles.right, "asked": needles.asked, "difference": needles.difference},
            "prefix_hit_rate": verdict.hit_rates(results, workload),
            "quantiles": results.distributions.get(workload, {}),
        }
    return {
        "schema": SCHEMA,
        "command": command,
        "complete": results.complete,
        "missing": verdict.missing(results),
        "seconds": results.seconds,
        "sides": results.described,
        "versions": results.versions,
        "settings": asdict(results.plan),
        "kv_capacity_tokens": results.capacity,
        "workloads": workloads,
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
    if not results.complete:
        case = TestCase("ended by itself")
        case.result = [Failure(why) for why in verdict.missing(results)]
        suite.add_testcase(case)
    for workload in results.gain:
        case = TestCase("answers without errors", workload)
        counts = errors_of([point for point in results.points if point.workload == workload])
        if counts:
            case.result = [Failure(", ".join(f"{kind}: {count}" for kind, count in counts.items()))]
        suite.add_testcase(case)
    for requirement, failures in judged:
        for workload, why in failures.items():
            case = TestCase(requirement.text, workload)
            if why:
                case.result = [Failure(why)]
            suite.add_testcase(case)
    document = JUnitXml()
    document.add_testsuite(suite)
    return document


def _page(results: Results, rows: dict[str, dict[str, Ratio]], judged: list[Any], command: str) -> str:
    pages = Environment(loader=PackageLoader("loadtests"), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    figures = {
        workload: {
            name: html(figure, f"{name}-{workload}") for name, figure in plots_of_workload(results, workload).items()
        }
        for workload in rows
    }
    points = results.points
    return pages.get_template("compare.html.j2").render(
        results=results,
        plan=results.plan,
        answers={workload: _answer(results, workload) for workload in rows},
        missing=verdict.missing(results),
        rows=rows,
        titles=ROWS,
        levels={workload: verdict.level_figures(results, workload) for workload in rows},
        hit_rates={workload: verdict.hit_rates(results, workload) for workload in rows},
        judged=judged,
        errors=errors_of(points),
        early=sum(point.figures.given_up for point in points),
        unsteady=sum(not point.figures.steady and not point.figures.given_up for point in points),
        off=max(float(np.median([point.client.off for point in points])), max(point.client.off for point in points)),
        cpu=max(point.client.cpu for point in points),
        least_requests=LEAST_REQUESTS,
        plots=figures,
        over_time={name: html(figure, name) for name, figure in plots_of_time(results).items()},
        plotly=Markup(get_plotlyjs()),
        command=command,
        settings=json.dumps(_plain(asdict(results.plan)), indent=1),
        sides=SIDES,
    )


def _answer(results: Results, workload: str) -> dict[str, Any]:
    """The first screen: which serves more, by how much, how sure, at what cost."""
    gain = results.gain[workload]
    word = "B serves more" if gain.low > 1 else "B serves less" if gain.high < 1 else "No difference"
    return {
        "word": word,
        "gain": gain,
        "served": results.served[workload],
        "verdict": verdict.verdict(results, workload),
        "quality": verdict.quality(results, workload),
        "needles": verdict.needles_of(results, workload),
    }
