"""The table, and each of its rows that is a class of vLLM's own, against the plain reference."""

import pytest

from model_executors.families import FAMILIES, family_of
from tests.parity import check, each_shape_first
from tests.tiny import CONFIGS

TRACED = ("Ernie4_5", "GraniteMoe")
"""Those traced at every commit: one that vLLM compiles together with its head, and one with experts."""
NATIVE = [name for name in CONFIGS if FAMILIES[f"{name}ForCausalLM"].module == "model_executors.layers.decoder"]


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


@pytest.mark.parametrize("name", each_shape_first(NATIVE))
def test_equals_the_reference(tiny_models, tmp_path, name):
    check(name, tiny_models(name), tmp_path / "planned")


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[pytest.mark.nightly] * (each not in TRACED)) for each in NATIVE]
)
def test_traced_equals_the_reference(tiny_models, tmp_path, monkeypatch, name):
    """As Dynamo traces it, which is where families differ; `test_decoder.py` has Inductor compile one."""
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")  # vLLM's own word for that
    check(name, tiny_models(name), tmp_path / "planned", enforce_eager=False)
