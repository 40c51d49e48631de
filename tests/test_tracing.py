"""What planned layers add is one graph each: no break, no shape that depends on data, nothing read on the host.

This is what CUDA graphs and `torch.compile` ask for, checked on the CPU: `fullgraph=True` fails at a graph break, and
under fake tensors any read of a value (`.item()`, `nonzero`, a branch on data) raises. No GPU has run it.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.linear import UnquantizedLinearMethod

from model_executors.attention_plan import LayerPlan
from model_executors.heads.character_head import CharacterHead, with_exact
from model_executors.heads.exact_rows import exact_scores
from model_executors.heads.head_plan import HeadShape
from model_executors.heads.screened_head import Int4Copy, screened_scores
from model_executors.layers.consolidation import Consolidation
from model_executors.layers.freeze import FrozenUpper, select_rows
from tests.engines import engine, runner
from tests.fitted import write_random
from tests.test_freeze import PLANS

HIDDEN = 128


@pytest.fixture(scope="module")
def model(tiny_models, tmp_path_factory):
    """Windows, frozen layers and a tail with a linear map, in an engine."""
    changes = PLANS["with windows"] | PLANS["below a tail"]
    folder = write_random(tiny_models("Llama"), tmp_path_factory.mktemp("tracing") / "planned", changes)
    with engine(folder) as llm, set_current_vllm_config(llm.llm_engine.vllm_config):
        yield runner(llm).model


def graphs_of(call, *sizes):
    """How many graphs a call is compiled to over batches of several sizes, which must be one."""
    counter = CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=counter)
    for given in map(states, sizes):
        torch.testing.assert_close(compiled(given), call(given))
    return counter.frame_count


def states(size):
    return torch.randn(size, HIDDEN, generator=torch.Generator().manual_seed(size))


def test_the_tail_and_what_a_skipped_layer_adds(model):
    """As they are written, without vLLM's own compilation around them."""
    assert graphs_of(model.tail.forward, 3, 5, 9) == 1
    consolidation = model.model.layers[5].self_attn
    assert graphs_of(lambda given: consolidation(None, given), 3, 5, 9) == 1


def test_keys_and_values_of_frozen_tokens(model):
    frozen = model.model.layers[4].self_attn.frozen_proj["qkv_proj"]
    assert graphs_of(lambda given: frozen(given)[0], 3, 5, 9) == 1


def test_frozen_layers_mix_rows_by_an_index_of_fixed_length():
    """`index_copy` and `where`, whose results have the shapes of what they are given; nothing like `nonzero`."""
    with FakeTensorMode():
        key, own = torch.empty(9, 64), torch.empty(4, 64)
        index, generating = torch.empty(4, dtype=torch.long), torch.empty(4, 1, dtype=torch.bool)
        mixed = key.index_copy(0, index, torch.where(generating, own, key[index]))
        assert mixed.shape == key.shape
    assert FrozenUpper.forward.__code__.co_argcount == 5  # the index is given to it, made outside of the graph


class TracedError(Exception):
    """Raised once a graph is whole."""


def ways(model):
    """Both ways through frozen layers, with what each is given for `size` tokens."""

    def given(size):
        return torch.arange(size), states(size)

    index = torch.tensor([0, 3])
    return {
        "upper": (model.freeze.upper.forward, given),
        "frozen": (
            model.freeze.frozen.forward,
            lambda size: (*given(size), index, torch.tensor([[True], [False]])),
        ),
    }


@pytest.mark.parametrize("way", ["upper", "frozen"])
def test_frozen_layers_are_one_graph(model, way):
    """TracedError under fake tensors, the kernels being vLLM's own operators, whose results' shapes torch is told."""
    forward, given = ways(model)[way]
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        raise TracedError  # there is no KV cache to run it on

    torch._dynamo.reset()
    with pytest.raises(Exception, match="TracedError"):
        torch.compile(forward, fullgraph=True, dynamic=True, backend=backend)(*given(9))
    (graph,) = graphs
    called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    layers = len(model.freeze.upper.parts[0])
    assert sum("unified_attention_with_output" in name for name in called) == layers
    assert sum("unified_kv_cache_update" in name for name in called) == layers


@pytest.mark.parametrize(
    "kind", [{"consolidation": "none"}, {"consolidation": "bias"}, {"consolidation": "linear", "rank": 8}]
)
def test_consolidations_are_one_graph(model, kind):
    with torch.device("cpu"):
        consolidation = Consolidation(HIDDEN, LayerPlan("skip", **kind), True, "made")
    for parameter in consolidation.parameters():
        parameter.data.normal_()
    for module in consolidation.modules():
        if isinstance(getattr(module, "quant_method", None), UnquantizedLinearMethod):
            module.quant_method.process_weights_after_loading(module)
    assert graphs_of(lambda given: consolidation(None, given), 3, 5, 9) == 1


def test_which_rows_go_on_is_chosen_on_the_host():
    """Not traceable, and not traced: the builder does it from CPU tensors before a step, so no device is waited for."""
    with FakeTensorMode():
        bounds, prefilling = torch.empty(5, dtype=torch.int32), torch.empty(4, dtype=torch.bool)
        with pytest.raises(Exception, match=r"item|repeat_interleave|data-dependent|Dynamic|dynamic") as raised:
            select_rows(bounds, prefilling)
    assert isinstance(raised.value, DataDependentOutputException | RuntimeError)


def test_the_screened_head_is_one_graph():
    weight = torch.randn(320, HIDDEN)
    copy = Int4Copy(weight)
    assert graphs_of(lambda given: screened_scores(copy(given), given, weight, 16), 2, 3, 4) == 1


def test_character_heads():
    spellings = torch.randint(0, 5, (50, 3))
    heads = CharacterHead(HeadShape(HIDDEN, 50, (5, 5, 5)), torch.float32)
    for name, parameter in heads.named_parameters():
        parameter.data.copy_(spellings if name == "spellings" else torch.randn(parameter.shape))
    heads.prepare()
    assert graphs_of(heads.forward, 3, 5, 9) == 1
    weight = torch.randn(50, HIDDEN)

    def rescored_best(given):
        scores = heads(given)
        tokens = scores.topk(8, sorted=False).indices
        with_exact(scores, tokens, exact_scores(given, weight, tokens))
        return scores

    assert graphs_of(rescored_best, 3, 5, 9) == 1
