"""Planned models over vLLM's Transformers backend: OLMo 2 in full, and every other family."""

import pytest

from model_executors.attention_plan import LayerPlan
from model_executors.families import FAMILIES
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine, runner, skipping
from tests.fitted import write_random
from tests.parity import check, each_shape_first
from tests.reference import answers_apart
from tests.tiny import CONFIGS, NUM_LAYERS, prompts

PLANS = {
    "none": {},
    "tail": skipping([4, 5]),
    "middle": skipping([1, 3]),
    "all but the first": skipping([1, 2, 3, 4, 5]),
    "every kind": {
        1: LayerPlan("window", 16),
        2: LayerPlan("skip", consolidation="bias"),
        3: LayerPlan("window", 128),
        4: LayerPlan("skip", consolidation="linear"),
        5: LayerPlan("skip", consolidation="linear", rank=8),
    },
}


@pytest.fixture(scope="module")
def planned(tiny_models, tmp_path_factory):
    """The folder of each plan, and what the reference answers."""
    root = tmp_path_factory.mktemp("olmo2")
    folders = {name: write_random(tiny_models("Olmo2"), root / name, plan) for name, plan in PLANS.items()}
    expected = answers_apart([(folders[name], PLANS[name]) for name in PLANS], prompts(), NEW_TOKENS)
    return {name: (folders[name], answer) for name, answer in zip(PLANS, expected, strict=True)}


BACKEND = "model_executors.layers.transformers_decoder"
OTHERS = [
    name for name in CONFIGS if FAMILIES[f"{name}ForCausalLM"].module == "model_executors.layers.transformers_decoder"
]


@pytest.mark.parametrize("name", each_shape_first(OTHERS))
def test_every_family_equals_the_reference(tiny_models, tmp_path, name):
    """Before any engine of the same class: that changes transformers' own."""
    check(name, tiny_models(name), tmp_path / "planned")


@pytest.mark.parametrize("name", PLANS)
def test_equals_the_reference(planned, name):
    folder, expected = planned[name]
    with engine(folder) as llm:
        assert_same(answers(llm, prompts()), expected)


def test_refuses_to_be_compiled(planned):
    with pytest.raises(ValueError, match="add --enforce-eager"), engine(planned["tail"][0], enforce_eager=False):
        pass


def test_skipped_layers_hold_no_cache_and_no_weights(tiny_models):
    with engine(tiny_models("Olmo2")) as llm:
        stock_names = {name for name, _ in runner(llm).model.named_parameters()}
    with engine(tiny_models("Olmo2"), skipping([1, 4, 5])) as llm:
        names = {name for name, _ in runner(llm).model.named_parameters()}
        groups = runner(llm).kv_cache_config.kv_cache_groups
    assert sorted(name for group in groups for name in group.layer_names) == [
        f"model.layers.{layer}.self_attn.attn" for layer in range(NUM_LAYERS) if layer not in (1, 4, 5)
    ]
    dropped = tuple(f"model.layers.{layer}.self_attn." for layer in (1, 4, 5))
    assert names == {name for name in stock_names if not name.startswith(dropped)}
    assert len(names) < len(stock_names)


def test_prompt_tokens_do_not_enter_the_tail(tiny_models):
    with engine(tiny_models("Olmo2"), skipping([4, 5])) as llm:
        rows = []
        mlp = runner(llm).model.tail.parts[0][1].mlp
        mlp.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[1]))
        answers(llm, prompts((100,)), max_tokens=3, prompt_logprobs=False)
    assert rows == [1, 1, 1]
