"""The KV cache's capacity, and the stock model's in the same memory, beside what vLLM's engines say themselves."""

import pytest

from model_executors.attention_plan import AttentionPlan, LayerPlan
from serving.capacity import capacities
from tests.engines import engine
from tests.fitted import write_random

SETTINGS = {"kv_cache_memory_bytes": 2**26, "max_model_len": 512, "max_num_batched_tokens": 128}
PLANS = {
    "windows": dict.fromkeys([3, 4, 5], LayerPlan("window", 128)),
    "few windows": dict.fromkeys([1, 5], LayerPlan("window", 64)),
    "frozen windows and skipped": {3: LayerPlan("freeze"), 4: LayerPlan("freeze", 128), 5: LayerPlan("skip")},
}


@pytest.mark.parametrize("name", PLANS)
def test_equals_what_the_engines_say(tiny_models, tmp_path, name):
    plan = AttentionPlan.of(6, PLANS[name])
    folder = write_random(tiny_models("Llama"), tmp_path / "planned", PLANS[name])
    with engine(folder, **SETTINGS) as llm:
        config = llm.llm_engine.vllm_config
        held, stock_beside = capacities(config, plan)
        # In the process of the API server nobody has settled the cache's layout.
        config.cache_config.kv_cache_layout = None
        assert capacities(config, plan) == (held, stock_beside)
        # Of our own arithmetic nothing is taken from the engine but the number of blocks.
        tokens = kept_tokens(llm)
    with engine(tiny_models("Llama"), **SETTINGS) as llm:
        stock, same = capacities(llm.llm_engine.vllm_config, AttentionPlan.of(6))
        stock_tokens, stock_bytes = kept_tokens(llm), kept_bytes(llm)
    assert held.tokens == tokens
    assert stock == same
    assert (stock.tokens, stock.bytes) == (stock_tokens, stock_bytes)
    # A block of the planned model may leave less than a block of the stock one at the end of the memory.
    assert stock.tokens - 128 <= stock_beside.tokens <= stock.tokens
    assert held.tokens > stock_beside.tokens


def kept_tokens(llm) -> int:
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def kept_bytes(llm) -> int:
    """Of the tensors themselves, each once: layers of different groups share theirs."""
    from tests.engines import runner

    storages = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in runner(llm).kv_caches}
    return sum(storages.values())
