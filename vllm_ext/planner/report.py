"""What a search found as a page with pictures, and as JSON that `vllm-ext choose` reads."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure as Picture

from model_executors.attention_plan import CONFIG_KEY, FULL, AttentionPlan, LayerPlan
from vllm_ext.errors import UsageError
from vllm_ext.layers import changes_of, format_options
from vllm_ext.planner.judge import Judged
from vllm_ext.planner.run import Front
from vllm_ext.planner.scan import FETCHES, Scan
from vllm_ext.reports.figures import Figure
from vllm_ext.reports.pages import write_page, write_picture
from vllm_ext.tasks.items import asked_in

SCORES = {"answers": "answered right", "tokens": "tokens ranked first", "summaries": "ROUGE-L"}
COLOURS = {"full": "#444444", "freeze": "#8fd3c1", "skip": "#f0f0f0"}
WINDOW_COLOURS = ("#bfdbf7", "#83b9f0", "#4c9be8", "#2a6fb3", "#1b4a7a")
"""Small windows to large ones."""
DEPTHS = 5


def write(front: Front, out: Path, command: Sequence[str]) -> Path:
    """Write `front.json`, the pictures and `report.html` into the folder `out`; returns the last."""
    plans = sorted(front.plans, key=lambda each: (each.kv_saved, each.prefill_saved))
    layers = front.header["layers"]
    rows = [_row(each, layers) for each in plans]
    scanned = None if front.scan is None else asdict(front.scan)
    (out / "front.json").write_text(json.dumps({"header": front.header, "scan": scanned, "plans": rows}) + "\n")
    pictures = {"front": front_picture(plans), "plans": plans_picture(plans, layers)}
    if front.scan is not None:
        pictures["scan"] = scan_picture(front.scan)
    if any(each.depths for each in plans):
        pictures["depths"] = depths_picture(plans)
    shown = {name: write_picture(picture, out / f"{name}.png") for name, picture in pictures.items()}
    file = out / "report.html"
    write_page(
        "plan.html.j2",
        file,
        header=front.header,
        scan=front.scan,
        pictures=shown,
        front=plans,
        described=[format_options(each.changes) or "stock" for each in plans],
        scores=SCORES,
        command=shlex.join(command),
    )
    return file


def read(file: Path) -> Front:
    """What an earlier search came to, from its `front.json`.

    Raises:
        UsageError: for a file that is none.

    """
    try:
        content = json.loads(file.expanduser().read_text())
        header = content["header"]
        plans = [_judged(row, header["layers"]) for row in content["plans"]]
        scanned = content["scan"]
        lost = {task: {int(layer): nats for layer, nats in each.items()} for task, each in scanned["lost"].items()}
        heads = {int(layer): nats for layer, nats in scanned["heads"].items()}
        return Front(header, Scan(scanned["window"], lost, heads), plans)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file}: no front.json of vllm-ext search ({error}); give the one in its --out") from error


def _judged(row: dict[str, Any], num_layers: int) -> Judged:
    plan = AttentionPlan.from_config(row[CONFIG_KEY], num_layers)
    tasks = {
        name: Figure(**figure | {"interval": tuple(figure["interval"]) if figure["interval"] else None})
        for name, figure in row["tasks"].items()
    }
    return Judged(
        changes_of(plan), row["kv_saved"], row["prefill_saved"], tasks, row["kept"], row["missed"], row["depths"]
    )


def _row(judged: Judged, num_layers: int) -> dict[str, Any]:
    return {
        CONFIG_KEY: AttentionPlan.of(num_layers, judged.changes).to_config(),
        "kv_saved": judged.kv_saved,
        "prefill_saved": judged.prefill_saved,
        "kept": judged.kept,
        "worst": judged.worst,
        "loss": judged.loss,
        "missed": judged.missed,
        "tasks": {name: asdict(figure) for name, figure in judged.tasks.items()},
        "depths": judged.depths,
    }


def scan_picture(scanned: Scan) -> Picture:
    """What a window on each layer alone costs, a row a task."""
    picture = Picture(figsize=(2.5 + 0.32 * len(scanned.layers), 1.4 + 0.36 * len(scanned.lost)), layout="constrained")
    panel = picture.subplots()
    values = np.array([[each[layer] for layer in scanned.layers] for each in scanned.lost.values()])
    image = panel.imshow(np.maximum(values, FETCHES / 10), aspect="auto", cmap="magma_r", norm="log")
    panel.set_xticks(range(len(scanned.layers)), [str(layer) for layer in scanned.layers], fontsize=7)
    panel.set_yticks(range(len(values)), list(scanned.lost))
    panel.set_xlabel("layer with a window")
    picture.colorbar(image, ax=panel, fraction=0.03, label="nats a token")
    return picture


def depths_picture(plans: Sequence[Judged]) -> Picture:
    """The heat map of needles: depth against length, of the unchanged model and of each plan."""
    shown = plans[-3:]
    found = [_by_depth(plans[0], "stock"), *(_by_depth(each, "score") for each in shown)]
    picture = Picture(figsize=(2.6 * len(found) + 0.8, 3), layout="constrained")
    panels = picture.subplots(1, len(found), squeeze=False, sharey=True)[0]
    titles = ["stock", *(f"{100 * each.kv_saved:.0f}% saved" for each in shown)]
    for panel, title, (lengths, cells) in zip(panels, titles, found, strict=True):
        image = panel.imshow(cells, aspect="auto", cmap="RdYlGn", vmin=0, vmax=1)
        panel.set_xticks(range(len(lengths)), [str(length) for length in lengths])
        panel.set_yticks(range(DEPTHS), [f"{100 * n // DEPTHS}-{100 * (n + 1) // DEPTHS}%" for n in range(DEPTHS)])
        panel.set_title(title, fontsize=9)
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the answer")
    picture.colorbar(image, ax=list(panels), fraction=0.03, label="score")
    return picture


def _by_depth(judged: Judged, column: str) -> tuple[list[int], Any]:
    """The lengths, and the mean scores `[DEPTHS, lengths]` of all tasks that retrieve; empty cells are none."""
    lengths = sorted({asked_in(name)[1] for name in judged.depths})
    cells: list[list[list[float]]] = [[[] for _ in lengths] for _ in range(DEPTHS)]
    for name, each in judged.depths.items():
        for depth, score in zip(each["depth"], each[column], strict=True):
            cells[min(int(depth * DEPTHS), DEPTHS - 1)][lengths.index(asked_in(name)[1])].append(score)
    return lengths, np.array([[np.mean(cell) if cell else np.nan for cell in row] for row in cells])


def front_picture(plans: Sequence[Judged]) -> Picture:
    """What is kept of the scores against what is saved of the KV cache."""
    picture = Picture(figsize=(7, 4.2), layout="constrained")
    panel = picture.subplots()
    saved = [100 * each.kv_saved for each in plans]
    panel.scatter(saved, [100 * each.kept for each in plans], label="mean of all tasks")
    panel.scatter(saved, [100 * each.worst for each in plans], facecolors="none", edgecolors="C0", label="worst task")
    if any(each.depths for each in plans):
        panel.scatter(saved, [100 * _retrieved(each) for each in plans], marker="^", label="mean of what retrieves")
    panel.axhline(100, color="0.5", linestyle=":")
    panel.set_xlabel("KV-cache bytes saved, %")
    panel.set_ylabel("kept of the unchanged model's score, %")
    panel.legend(fontsize=8)
    return picture


def _retrieved(judged: Judged) -> float:
    """The mean part that is kept of the tasks that retrieve."""
    found = [each.ratio for name, each in judged.tasks.items() if name in judged.depths and each.ratio is not None]
    return float(np.mean(found)) if found else 1.0


def plans_picture(plans: Sequence[Judged], num_layers: int) -> Picture:
    """Each plan a row, each layer a cell."""
    picture = Picture(figsize=(1.5 + 0.28 * num_layers, 1.2 + 0.3 * max(len(plans), 1)), layout="constrained")
    panel = picture.subplots()
    sizes = sorted({plan.window for each in plans for plan in each.changes.values() if plan.window is not None})
    for row, each in enumerate(plans):
        for layer in range(num_layers):
            colour = _colour(each.changes.get(layer, FULL), sizes)
            panel.add_patch(_square(layer, row, colour))
    panel.set_xlim(-0.5, num_layers - 0.5)
    panel.set_ylim(max(len(plans), 1) - 0.5, -0.5)
    panel.set_yticks(range(len(plans)), [f"{100 * each.kv_saved:.0f}% saved" for each in plans])
    panel.set_xticks(range(num_layers), [str(layer) for layer in range(num_layers)], fontsize=7)
    panel.set_xlabel("layer")
    windows = {f"window {size}": _colour(LayerPlan("window", size), sizes) for size in sizes}
    for name, colour in (COLOURS | windows).items():
        panel.plot([], [], "s", color=colour, markeredgecolor="0.6", label=name)
    picture.legend(loc="outside upper center", ncols=len(COLOURS) + len(sizes))
    return picture


def _colour(plan: LayerPlan, sizes: Sequence[int]) -> str:
    if plan.kind != "window":
        return COLOURS[plan.kind]
    return WINDOW_COLOURS[min(sizes.index(plan.window or 0), len(WINDOW_COLOURS) - 1)]


def _square(layer: int, row: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((layer - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white")
