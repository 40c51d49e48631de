"""What a probe found, as pictures and as one page that holds them."""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Picture

from vllm_ext.probe import manipulations
from vllm_ext.probe.attention import WINDOW
from vllm_ext.probe.run import Key, Results
from vllm_ext.reports.figures import Figure, mean
from vllm_ext.reports.pages import write_page, write_picture

SCORES = {"answers": "answered right", "tokens": "tokens ranked first", "summaries": "ROUGE-L"}


def write(results: Results, out: Path, command: Sequence[str]) -> Path:
    """Write the pictures and `report.html` into `out`; returns the latter. `command` is what a reader may repeat."""
    figures = {key: mean(row["scores"], 0) for key, row in results.found.items() if "scores" in row}
    pictures = {
        "score": scores_picture(results, figures),
        "injection": injection_picture(results),
        "layers": layers_picture(results, figures),
    }
    shown = {
        name: write_picture(picture, out / f"{name}.png") for name, picture in pictures.items() if picture is not None
    }
    file = out / "report.html"
    write_page(
        "probe.html.j2",
        file,
        header=results.header,
        pictures=shown,
        rows=figures.items(),
        titles=manipulations.TITLES | {"none": "unchanged"},
        scores=SCORES,
        command=shlex.join(command),
    )
    return file


def scores_picture(results: Results, figures: dict[Key, Figure]) -> Picture:
    """Score against layer, a line a manipulation, a panel a task: figure 2 of arXiv 2409.03621."""
    tasks = results.header["tasks"]
    picture = Picture(figsize=(4.2 * min(len(tasks), 3), 3.4 * -(-len(tasks) // 3)), layout="constrained")
    panels = picture.subplots(-(-len(tasks) // 3), min(len(tasks), 3), squeeze=False, sharex=True).flat
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for panel, (task, about) in zip(panels, tasks.items(), strict=False):
        unchanged = figures[Key("none", -1, task)].value
        panel.axhline(unchanged, color="0.5", linestyle=":", label="unchanged")
        for name, title in manipulations.TITLES.items():
            line = sorted((key.layer, found) for key, found in figures.items() if (key.name, key.task) == (name, task))
            if not line:
                continue
            layers, values = zip(*((layer, found.value) for layer, found in line), strict=True)
            panel.plot(layers, values, label=title, linewidth=1.5)
            intervals = [found.interval or (found.value, found.value) for _, found in line]
            panel.fill_between(layers, *zip(*intervals, strict=True), alpha=0.12, linewidth=0)
        panel.set_title(f"{task} ({about['items']} items)")
        panel.set_xlabel("layer k")
        panel.set_ylabel(SCORES[about["score"]])
        panel.set_ylim(bottom=0)
    handles, labels = next(iter(panels[: len(tasks)])).get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=3)
    return picture


def injection_picture(results: Results) -> Picture | None:
    """Which answer is given, against the layer at which a token is exchanged: figure 4 of arXiv 2409.03621."""
    rows = sorted((key.layer, row) for key, row in results.found.items() if key.name == "injection" and row["prompt"])
    if not rows:
        return None
    picture = Picture(figsize=(6, 3.4), layout="constrained")
    panel = picture.subplots()
    layers = [layer for layer, _ in rows]
    panel.plot(layers, [np.mean(row["prompt"]) for _, row in rows], label="the answer of the prompt")
    panel.plot(layers, [np.mean(row["injected"]) for _, row in rows], label="the answer of what was injected")
    panel.set_title(f"A country exchanged for another ({len(rows[0][1]['prompt'])} pairs)")
    panel.set_xlabel("layer k")
    panel.set_ylabel("part of the pairs")
    panel.set_ylim(-0.02, 1.02)
    panel.legend()
    return picture


def layers_picture(results: Results, figures: dict[Key, Figure]) -> Picture | None:
    """A heat map: what each layer's attention looks at, and what is lost without it alone."""
    looks = {key.layer: row for key, row in results.found.items() if key.name == "looks"}
    rows: dict[str, dict[int, float]] = {
        "on the first token": {layer: row["sink"] for layer, row in looks.items()},
        f"on the last {WINDOW} tokens": {layer: row["window"] for layer, row in looks.items()},
        "stream kept (cosine)": {layer: row["similarity"] for layer, row in looks.items()},
    }
    for task in results.header["tasks"]:
        unchanged = figures[Key("none", -1, task)].value
        dropped = {key.layer: found.value for key, found in figures.items() if (key.name, key.task) == ("drop", task)}
        near = {key.layer: found.value for key, found in figures.items() if (key.name, key.task) == ("window", task)}
        rows[f"{task} kept with a window"] = {layer: value / unchanged for layer, value in near.items() if unchanged}
        rows[f"{task} kept without it"] = {layer: value / unchanged for layer, value in dropped.items() if unchanged}
    rows = {name: row for name, row in rows.items() if row}
    if not rows:
        return None
    layers = sorted({layer for row in rows.values() for layer in row})
    picture = Picture(figsize=(2.5 + 0.32 * len(layers), 1.2 + 0.36 * len(rows)), layout="constrained")
    panel = picture.subplots()
    values = np.array([[row.get(layer, np.nan) for layer in layers] for row in rows.values()])
    image = panel.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    panel.set_xticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.set_xlabel("layer")
    picture.colorbar(image, ax=panel, fraction=0.03)
    return picture
