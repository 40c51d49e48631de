"""Frozen layers in vLLM against a reference that computes every token anew."""

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import set_forward_context

from model_executors.attention_plan import LayerPlan
from model_executors.layers.freeze import Freeze, entering_buffer, select_rows
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine, runner
from tests.fitted import write_random
from tests.reference import Reference
from tests.test_verify import configure
from tests.tiny import prompts

FREEZE = LayerPlan("freeze")
PLANS = {
    "top": {4: FREEZE, 5: FREEZE},
    "all but the first": dict.fromkeys(range(1, 6), FREEZE),
    "between skipped layers": {1: LayerPlan("skip"), 3: FREEZE, 4: LayerPlan("skip"), 5: FREEZE},
    "below a tail": {3: FREEZE, 4: FREEZE, 5: LayerPlan("skip", consolidation="linear")},
    "with windows": {2: LayerPlan("window", 16), 3: FREEZE, 4: LayerPlan("freeze", 20), 5: LayerPlan("freeze", 128)},
}
LENGTHS = (1, 2, 15, 16, 17, 19, 20, 21, 127, 128, 129, 200)


@pytest.fixture(scope="module")
def planned(tiny_models, tmp_path_factory):
    """The folder of a plan over tiny Llama, and what the reference answers."""
    made = {}

    def make(name: str):
        if name not in made:
            folder = write_random(tiny_models("Llama"), tmp_path_factory.mktemp("freeze") / "planned", PLANS[name])
            reference = Reference(folder, PLANS[name])
            made[name] = folder, [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)]
        return made[name]

    return make


@pytest.mark.parametrize("name", PLANS)
def test_equals_the_reference(planned, name):
    folder, expected = planned(name)
    with engine(folder) as llm:
        assert_same(answers(llm, prompts(LENGTHS), prompt_logprobs=False), expected, prompt_logprobs=False)


def test_prompt_tokens_do_no_work_and_have_no_logprobs(planned):
    """Of a prompt of 100 tokens one goes on, and each further step has one; log-probabilities of a prompt are refused,
    and the next request is answered.
    """
    folder, expected = planned("top")
    with engine(folder) as llm:
        rows = []
        mlp = runner(llm).model.model.layers[4].mlp
        hook = mlp.register_forward_hook(lambda _module, inputs, _output: rows.append(inputs[0].shape[0]))
        answers(llm, prompts((100,)), max_tokens=3, prompt_logprobs=False)
        hook.remove()
        with pytest.raises(VLLMValidationError, match=r"prompt_logprobs .* cannot be answered by this model"):
            answers(llm, prompts((100,)))
        assert_same(answers(llm, prompts(LENGTHS), prompt_logprobs=False), expected, prompt_logprobs=False)
    assert rows == [1, 1, 1]


def test_prompt_tokens_are_not_asked_with(planned):
    """Of a prompt of 100 tokens all have K and V made above, and one has Q; packed or not, the parts are the whole."""
    folder, _ = planned("top")
    with engine(folder) as llm:
        rows = {"merged": [], "frozen": []}
        attention = runner(llm).model.model.layers[4].self_attn
        frozen = attention.frozen_proj["qkv_proj"]
        for name, module in (("merged", attention.qkv_proj), ("frozen", frozen)):
            module.register_forward_hook(lambda _m, given, _o, name=name: rows[name].append(given[0].shape[0]))
        answers(llm, prompts((100,)), max_tokens=3, prompt_logprobs=False)
        assert rows == {"merged": [1, 1, 1], "frozen": [100]}
        states = torch.randn(5, 128)
        whole, parts = attention.qkv_proj(states)[0], frozen(states)[0]
    torch.testing.assert_close(parts[:, 128:], whole[:, 128:])
    assert not parts[:, :128].any()


def test_rows_that_go_on():
    """All rows of requests that generate, the last one of those that are prefilled; padding has no rows."""
    bounds = torch.tensor([0, 1, 6, 9, 10, 10], dtype=torch.int32)
    rows, selected = select_rows(bounds, torch.tensor([False, True, False, True, False]))
    assert rows.index.tolist() == [0, 5, 6, 7, 8, 9]
    assert rows.generating.flatten().tolist() == [True, False, True, True, True, False]
    assert selected.tolist() == [0, 1, 2, 5, 6, 6]


def test_graphs_of_the_upper_layers_read_from_memory_of_their_own(tiny_models):
    """Whatever memory the layers below leave their state in, which vLLM gives away again."""
    config = configure(tiny_models("Llama"), PLANS["top"])
    assert entering_buffer(config, torch.device("cpu")) is None  # there are no graphs on a CPU
    config.compilation_config.cudagraph_mode = CUDAGraphMode.PIECEWISE
    freeze = Freeze.__new__(Freeze)
    freeze.layer_name, freeze.entering = "layer", entering_buffer(config, torch.device("cpu"))
    read = []
    freeze.upper = lambda _positions, states: read.append((states.data_ptr(), states.clone()))
    given = [torch.randn(tokens, 128) for tokens in (3, 3, 1)]
    with set_forward_context({"layer": None}, config):
        for states in given:
            freeze(torch.arange(len(states)), states)
    assert {place for place, _ in read} == {freeze.entering.data_ptr()}
    assert all(torch.equal(states, seen) for states, (_, seen) in zip(given, read, strict=True))
