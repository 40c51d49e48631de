"""Planned models in vLLM against the plain reference; tests/test_families.py has one test of every family."""

import pytest

from model_executors.families import FAMILIES
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine, runner, skipping
from tests.reference import Reference
from tests.tiny import CONFIGS, NUM_LAYERS, prompts

PLANS = {
    "none": [],
    "top": [4, 5],
    "middle": [1, 3],
    "all but the first": [1, 2, 3, 4, 5],
}


def test_every_family_has_a_tiny_model():
    assert {f"{name}ForCausalLM" for name in CONFIGS} == set(FAMILIES)


@pytest.mark.parametrize("skip", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize(
    "family",
    [
        "Llama",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Phi3")
        ),
    ],
)
def test_equals_the_reference(tiny_models, family, skip):
    folder = tiny_models(family)
    reference = Reference(folder, skipping(skip))
    with engine(folder, skipping(skip)) as llm:
        assert_same(answers(llm, prompts()), [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()])


@pytest.mark.parametrize("skip", [[4, 5], pytest.param([1, 3], marks=pytest.mark.nightly)], ids=["top", "middle"])
def test_compiled_equals_the_reference(tiny_models, skip):
    folder = tiny_models("Llama")
    reference = Reference(folder, skipping(skip))
    with engine(folder, skipping(skip), enforce_eager=False) as llm:
        assert_same(answers(llm, prompts()), [reference.answer(prompt, NEW_TOKENS) for prompt in prompts()])


def test_skipping_no_layer_is_stock_vllm(tiny_models):
    with engine(tiny_models("Llama")) as llm:
        stock = answers(llm, prompts())
    with engine(tiny_models("Llama"), {}) as llm:
        assert answers(llm, prompts()) == stock


@pytest.mark.parametrize("skip", [[4, 5], [1, 3], [1, 2, 3, 4, 5]], ids=["top", "middle", "all but the first"])
def test_skipped_layers_hold_no_cache_and_no_weights(tiny_models, skip):
    with engine(tiny_models("Llama")) as llm:
        stock_names = parameter_names(llm)
        stock_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    with engine(tiny_models("Llama"), skipping(skip)) as llm:
        names = parameter_names(llm)
        blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
        groups = runner(llm).kv_cache_config.kv_cache_groups
        memory = llm.llm_engine.vllm_config.cache_config.kv_cache_memory_bytes

    attending = [layer for layer in range(NUM_LAYERS) if layer not in skip]
    assert sorted(name for group in groups for name in group.layer_names) == [
        f"model.layers.{layer}.self_attn.attn" for layer in attending
    ]
    # Exactly the blocks that fit: L/(L-m) as many as stock's, but that each rounds its own last block down.
    (spec,) = {group.kv_cache_spec for group in groups}
    pages = memory // spec.page_size_bytes
    assert (stock_blocks, blocks) == (pages // NUM_LAYERS, pages // len(attending))

    dropped = tuple(f"model.layers.{layer}.self_attn." for layer in skip)
    assert names == {name for name in stock_names if not name.startswith(dropped)}
    assert len(stock_names) - len(names) == 2 * len(skip)


def parameter_names(llm):
    return {name for name, _ in runner(llm).model.named_parameters()}


def test_prompt_tokens_do_not_enter_the_tail(tiny_models):
    """Of a prompt of 100 tokens one is sampled, and each further step samples one."""
    with engine(tiny_models("Llama"), skipping([4, 5])) as llm:
        rows = []
        tail_layer = runner(llm).model.model.layers[5].mlp
        tail_layer.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
        answers(llm, prompts((100,)), max_tokens=3, prompt_logprobs=False)
    assert rows == [1, 1, 1]
