"""The front that a search found, as a picture and a page, and its figures as JSON."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure as Picture

from model_executors.attention_plan import FULL, KINDS, Kind
from vllm_ext.errors import UsageError
from vllm_ext.layers import format_options, layer_plans
from vllm_ext.planner.judge import Judged
from vllm_ext.planner.run import Found
from vllm_ext.planner.search import Changes
from vllm_ext.probe.report import SCORES
from vllm_ext.reports.figures import Figure
from vllm_ext.reports.pages import write_page, write_picture

COLOURS: dict[Kind, str] = {"full": "#444444", "window": "#4c9be8", "freeze": "#8fd3c1", "skip": "#f0f0f0"}


def write(found: Found, out: Path, command: Sequence[str]) -> Path:
    """Write `front.png`, `plans.png`, `front.json` and `report.html` into the folder `out`; returns the last."""
    out.mkdir(parents=True, exist_ok=True)
    front = sorted(found.front, key=lambda each: (each.kv_saved, each.prefill_saved))
    taken = next((each for each in front if each.changes == found.changes), None)
    if found.written is not None:
        front.append(found.written)
    shown = {
        "front": write_picture(front_picture(front, taken), out / "front.png"),
        "plans": write_picture(plans_picture(front, found.header["layers"]), out / "plans.png"),
    }
    rows = [_row(each, each is taken, each is found.written) for each in front]
    (out / "front.json").write_text(
        json.dumps({"header": found.header, "passes": found.passes, "plans": rows}, indent=1)
    )
    file = out / "report.html"
    write_page(
        "plan.html.j2",
        file,
        header=found.header,
        passes=found.passes,
        pictures=shown,
        front=front,
        chosen=taken,
        written=found.written,
        described=[format_options(each.changes) for each in front],
        scores=SCORES,
        command=shlex.join(command),
    )
    return file


def read(file: Path) -> Found:
    """What an earlier search came to, from its `front.json`.

    Raises:
        UsageError: for a file that is none, or holds a guess.

    """
    try:
        content = json.loads(file.read_text())
        front = [
            Judged(
                _changes(row["options"]),
                row["kv_saved"],
                row["prefill_saved"],
                {name: Figure(**figure) for name, figure in row["tasks"].items()},
                row["kept"],
            )
            for row in content["plans"]
            if not row["written"]
        ]
        found = Found(content["header"], front=front, passes=content["passes"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--front {file}: no front.json of vllm-ext plan --auto ({error})") from error
    if not front:
        raise UsageError(f"--front {file}: it holds a guess, and no plans to choose from")
    return found


def _changes(options: str) -> Changes:
    """What `format_options` writes."""
    words = iter(options.split())
    given: dict[str, Any] = {name.removeprefix("--"): value for name, value in zip(words, words, strict=True)}
    return layer_plans(**given)


def front_picture(front: Sequence[Judged], chosen: Judged | None) -> Picture:
    """What is kept of the scores against what is saved of the KV cache."""
    picture = Picture(figsize=(7, 4.2), layout="constrained")
    panel = picture.subplots()
    kinds = {"windows": "o", "windows, top frozen": "^", "windows, top skipped": "s"}
    for (name, marker), points in zip(kinds.items(), _by_top(front), strict=True):
        if points:
            saved = [100 * each.kv_saved for each in points]
            dots = panel.scatter(saved, [100 * each.kept for each in points], marker=marker, label=f"{name}: mean")
            worst = [100 * each.worst for each in points]
            panel.scatter(
                saved, worst, marker=marker, facecolors="none", edgecolors=dots.get_facecolor(), label="worst task"
            )
    if chosen is not None:
        panel.scatter(
            [100 * chosen.kv_saved], [100 * chosen.kept], s=220, facecolors="none", edgecolors="red", label="taken"
        )
    panel.axhline(100, color="0.5", linestyle=":")
    panel.set_xlabel("KV-cache bytes saved, %")
    panel.set_ylabel("kept of the unchanged model's score, %")
    panel.legend(fontsize=8)
    return picture


def plans_picture(front: Sequence[Judged], num_layers: int) -> Picture:
    """Each plan a row, each layer a cell."""
    picture = Picture(figsize=(1.5 + 0.28 * num_layers, 1.2 + 0.3 * len(front)), layout="constrained")
    panel = picture.subplots()
    cells = [[KINDS.index(each.changes.get(layer, FULL).kind) for layer in range(num_layers)] for each in front]
    panel.imshow(cells, aspect="auto", cmap=ListedColormap([COLOURS[kind] for kind in KINDS]), vmin=-0.5, vmax=3.5)
    panel.set_yticks(range(len(front)), [f"{100 * each.kv_saved:.0f}% saved" for each in front])
    panel.set_xticks(range(num_layers), [str(layer) for layer in range(num_layers)], fontsize=7)
    panel.set_xlabel("layer")
    for kind in KINDS:
        panel.plot([], [], "s", color=COLOURS[kind], markeredgecolor="0.6", label=kind)
    picture.legend(loc="outside upper center", ncols=len(KINDS))
    return picture


def _by_top(front: Sequence[Judged]) -> tuple[list[Judged], ...]:
    tops = [[plan.kind for plan in each.changes.values()] for each in front]
    return (
        [each for each, kinds in zip(front, tops, strict=True) if "freeze" not in kinds and "skip" not in kinds],
        [each for each, kinds in zip(front, tops, strict=True) if "freeze" in kinds],
        [each for each, kinds in zip(front, tops, strict=True) if "freeze" not in kinds and "skip" in kinds],
    )


def _row(judged: Judged, taken: bool, written: bool) -> dict[str, Any]:
    return {
        "options": format_options(judged.changes),
        "taken": taken,
        "written": written,
        "kv_saved": judged.kv_saved,
        "prefill_saved": judged.prefill_saved,
        "kept": judged.kept,
        "worst": judged.worst,
        "tasks": {name: asdict(figure) for name, figure in judged.tasks.items()},
    }
