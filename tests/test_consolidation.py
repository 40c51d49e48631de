"""Skipped layers that add a fitted vector or map, against matrix products written out."""

import pytest

from model_executors.attention_plan import LayerPlan
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import prompts

PLAN = {
    1: LayerPlan("skip", consolidation="linear"),
    2: LayerPlan("skip", consolidation="bias"),
    4: LayerPlan("skip", consolidation="linear", rank=8),
    5: LayerPlan("skip", consolidation="linear"),
}
TAIL = {
    3: LayerPlan("skip", consolidation="bias"),
    4: LayerPlan("skip", consolidation="linear", rank=8),
    5: LayerPlan("skip", consolidation="bias"),
}


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3"])
def test_equals_the_reference(tiny_models, tmp_path, family):
    folder = write_random(tiny_models(family), tmp_path / family, PLAN)
    reference = Reference(folder, PLAN)
    with engine(folder) as llm:
        assert_same(answers(llm, prompts()), [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()])


@pytest.mark.parametrize("changes", [TAIL, PLAN], ids=["tail", "middle"])
def test_compiled_equals_the_reference(tiny_models, tmp_path, changes):
    folder = write_random(tiny_models("Llama"), tmp_path / "planned", changes)
    reference = Reference(folder, changes)
    with engine(folder, enforce_eager=False) as llm:
        assert_same(answers(llm, prompts()), [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()])


def test_refuses_a_checkpoint_without_its_fitted_tensors(tiny_models, tmp_path):
    folder = write_random(tiny_models("Llama"), tmp_path / "planned", PLAN)
    (folder / "vllm_ext.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no vllm_ext\.layers\.1\.bias; write it with vllm-ext plan"), engine(folder):
        pass
