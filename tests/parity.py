"""One family in vLLM against the plain reference, with every kind of layer that it can have at once."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES
from tests.answers import assert_same
from tests.engines import answers, engine
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import CONFIGS, prompts

# Below the first frozen layer, and up to a tail. In some families, even layers have a sliding window of their own.
PLAN = {
    1: LayerPlan("window", 16),
    2: LayerPlan("skip"),
    3: LayerPlan("freeze"),
    4: LayerPlan("freeze"),
    5: LayerPlan("skip", consolidation="linear"),
}
LENGTHS = (2, 17, 129)
# vLLM computes Apertus' activation partly in bfloat16.
TOLERANCE = {"Apertus": 1e-2}


def each_shape_first(names: Iterable[str]) -> list:
    """The families, of which the first of each shape is checked at every commit and the others by `make test-all`.

    A shape is a row of the table but for its name, with or without experts, with or without windows of its own.
    """
    seen: set[tuple] = set()
    marked = []
    for name in names:
        row, settings = FAMILIES[f"{name}ForCausalLM"], CONFIGS[name][1]
        experts = any("experts" in setting for setting in settings)
        shape = (replace(row, architecture=""), experts, "layer_types" in settings and not experts)
        marked.append(pytest.param(name, marks=[pytest.mark.nightly] * (shape in seen)))
        seen.add(shape)
    return marked


def check(name: str, stock: Path, planned: Path, **settings: Any) -> None:
    """`stock` is the family's tiny model, and `planned` where it goes with the plan; `settings` are the engine's."""
    kinds = FAMILIES[f"{name}ForCausalLM"].kinds
    changes = {layer: plan for layer, plan in PLAN.items() if plan.kind in kinds}
    folder = write_random(stock, planned, changes)
    prompt_logprobs = "freeze" not in kinds
    reference = Reference(folder, changes)
    expected = [reference.answer(prompt, 4) for prompt in prompts(LENGTHS)]
    with engine(folder, **settings) as llm:
        given = answers(llm, prompts(LENGTHS), 4, prompt_logprobs=prompt_logprobs)
    assert_same(given, expected, TOLERANCE.get(name, 2e-4), prompt_logprobs=prompt_logprobs)
