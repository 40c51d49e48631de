"""The table, and each of its rows in vLLM against the plain reference."""

import pytest

from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES, family_of
from tests.answers import assert_same
from tests.engines import answers, engine
from tests.fitted import write_random
from tests.reference import Reference
from tests.tiny import CONFIGS, prompts

# Every kind at once: below the first frozen layer, and up to a tail. In some families, even layers have a sliding
# window of their own.
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


@pytest.mark.parametrize(
    ("architecture", "tensor", "dropped"),
    [
        ("LlamaForCausalLM", "model.layers.3.self_attn.q_proj.weight", True),
        ("LlamaForCausalLM", "model.layers.3.input_layernorm.weight", False),
        ("LlamaForCausalLM", "model.layers.3.mlp.up_proj.weight", False),
        ("LlamaForCausalLM", "model.layers.13.self_attn.q_proj.weight", False),
        ("LlamaForCausalLM", "model.embed_tokens.weight", False),
        ("LlamaForCausalLM", "lm_head.weight", False),
        ("Gemma2ForCausalLM", "model.layers.3.post_attention_layernorm.weight", False),
    ],
)
def test_knows_the_tensors_of_a_skipped_attention(architecture, tensor, dropped):
    assert FAMILIES[architecture].drops(tensor, {3}) == dropped


def test_is_found_by_its_stock_and_its_planned_name():
    assert family_of("Qwen3ForCausalLM") is family_of("AttentionPlanQwen3ForCausalLM")


def test_refuses_an_architecture_without_a_row():
    with pytest.raises(ValueError, match="BertModel has no attention plan; use one of LlamaForCausalLM"):
        family_of("BertModel")


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_reference(tiny_models, tmp_path, name):
    kinds = FAMILIES[f"{name}ForCausalLM"].kinds
    changes = {layer: plan for layer, plan in PLAN.items() if plan.kind in kinds}
    folder = write_random(tiny_models(name), tmp_path / "planned", changes)
    prompt_logprobs = "freeze" not in kinds
    reference = Reference(folder, changes)
    expected = [reference.answer(prompt, 4) for prompt in prompts(LENGTHS)]
    with engine(folder) as llm:
        given = answers(llm, prompts(LENGTHS), 4, prompt_logprobs=prompt_logprobs)
    assert_same(given, expected, TOLERANCE.get(name, 2e-4), prompt_logprobs=prompt_logprobs)
