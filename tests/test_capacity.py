"""The KV cache's capacity, and the stock model's in the same memory, beside what vLLM's engines say themselves."""

import random

import pytest
from vllm import SamplingParams

from model_executors.attention_plan import AttentionPlan, LayerPlan
from serving.capacity import capacities
from tests.engines import engine
from tests.fitted import write_random
from vllm_ext.checkpoint import Checkpoint

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


@pytest.mark.nightly
@pytest.mark.parametrize(("length", "least"), [(8_192, 1.4), (16_384, 1.9)])
def test_windows_on_two_thirds_of_the_layers_hold_more_requests_under_load(tiny_models, length, least):
    """As many are said to be held: with vLLM's default batch for GPUs, in the same bytes, and long prompts at once."""
    config = Checkpoint.open(str(tiny_models("Llama")), weights=False).config
    token = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    settings = {
        "hf_overrides": {"max_position_embeddings": 2 * length},
        "max_model_len": length,
        "max_num_batched_tokens": 8_192,
        "kv_cache_memory_bytes": (6 * length + 256) * token,
    }
    most = []
    for changes in ({}, dict.fromkeys(range(1, 5), LayerPlan("window", 128))):
        with engine(tiny_models("Llama"), changes, **settings) as llm:
            most.append(residents(llm, length, 16))
    assert most[0] == 6
    assert most[1] >= least * most[0]


def residents(llm, length, count) -> int:
    """The most requests that generate at once, of `count` whose answers end at `length` tokens."""
    chosen, scheduler = random.Random(0), llm.llm_engine.engine_core.engine_core.scheduler
    sampling = SamplingParams(max_tokens=64, ignore_eos=True, detokenize=False)
    for number in range(count):
        prompt = [chosen.randrange(3, 256) for _ in range(length - 64)]
        llm.llm_engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    most = 0
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()
        most = max(most, sum(each.num_computed_tokens >= each.num_prompt_tokens for each in scheduler.running))
    return most
