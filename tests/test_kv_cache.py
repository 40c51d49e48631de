"""The blocks that window layers hold, by vLLM's own manager of the KV cache, against what a step's tokens see."""

import random

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry
from vllm.v1.request import Request

from model_executors.hooks.kv_cache import SinkWindowManager, SinkWindowSpec

BLOCK, LONGEST = 4, 400
COMMON = {"block_size": BLOCK, "num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
FULL, WINDOWS = 0, 1  # the groups


def window_spec(window, sink, in_flight=16):
    return SinkWindowSpec(**COMMON, sliding_window=window, sink=sink, in_flight_tokens=in_flight)


def manager(*windows, blocks=1_000, longest=LONGEST):
    """Of a full layer and those windows, in groups of one."""
    specs = FullAttentionSpec(**COMMON), *windows
    groups = [KVCacheGroupSpec([str(number)], each) for number, each in enumerate(specs)]
    config = KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=groups)
    return KVCacheManager(config, longest, scheduler_block_size=BLOCK, hash_block_size=BLOCK, max_in_flight_tokens=16)


def request(name, tokens):
    init_none_hash(sha256)
    hasher = get_request_block_hasher(BLOCK, sha256)
    return Request(name, tokens, SamplingParams(max_tokens=8), None, block_hasher=hasher)


def run(kept, asked, chunk):
    """Compute a request in chunks; yields each step's first token, when it holds what the step needs."""
    found, cached, _ = kept.get_computed_blocks(asked)
    while asked.num_computed_tokens < asked.num_tokens:
        new = min(chunk, asked.num_tokens - asked.num_computed_tokens - cached)
        assert kept.allocate_slots(asked, new, cached, found) is not None
        asked.num_computed_tokens += cached
        found, cached = None, 0
        yield asked.num_computed_tokens
        asked.num_computed_tokens += new


def held(kept, asked, group=WINDOWS):
    """The numbers of a request's blocks that it holds."""
    null = kept.block_pool.null_block
    blocks = kept.coordinator.single_type_managers[group].req_to_blocks[asked.request_id]
    return {number for number, block in enumerate(blocks) if block is not null}


def seen(window, sink, first, last):
    """The blocks with a token that one of the tokens `first` to `last` sees."""
    return {
        place // BLOCK
        for token in range(first, last + 1)
        for place in range(token + 1)
        if place < sink or place > token - window
    }


@pytest.mark.parametrize("window", [1, 3, 4, 5, 8, 11, 30])
@pytest.mark.parametrize("sink", [1, 4, 5, 16])
@pytest.mark.parametrize("chunk", [1, 3, 4, 7, 16])
def test_holds_what_the_step_sees_and_no_more_than_is_charged(window, sink, chunk):
    spec = window_spec(window, sink, in_flight=chunk)
    kept, asked = manager(spec), request("one", list(range(133)))
    most = 0
    for first in run(kept, asked, chunk):
        last = min(first + chunk, 133) - 1
        assert held(kept, asked) == seen(window, sink, first, last) | seen(1, sink, 0, min(sink, last + 1) - 1)
        most = max(most, len(held(kept, asked)))
    assert most <= spec.max_admission_blocks_per_request(1_000, LONGEST)
    assert held(kept, asked, FULL) == set(range(-(-133 // BLOCK)))
    kept.free(asked)
    assert kept.usage == 0


def test_is_charged_for_no_more_than_all_of_its_tokens():
    assert window_spec(30, 4).max_admission_blocks_per_request(1_000, 21) == 6
    assert window_spec(30, 4).max_admission_blocks_per_request(1_000, LONGEST) == 1 + 12 + 1


@pytest.mark.parametrize(("length", "gain"), [(8_192, 1.47), (16_384, 1.97)])
def test_windows_on_two_thirds_of_the_layers_hold_more_with_batches_of_8192(length, gain):
    """Of vLLM's blocks for GPUs, with two batches under way, each with 2,048 tokens of a request at most."""
    shape = COMMON | {"block_size": 16}
    spec = SinkWindowSpec(**shape, sliding_window=128, sink=4, in_flight_tokens=2 * 2_048)
    stock = SlidingWindowSpec(**shape, sliding_window=128)
    full, windowed, stocks = (
        length // 16,
        *(each.max_admission_blocks_per_request(2 * 8_192, length) for each in (spec, stock)),
    )
    assert 3 * full / (full + 2 * windowed) == pytest.approx(gain, abs=0.01)
    assert 3 * full / (full + 2 * stocks) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("window", "sink"), [(2, 1), (5, 4), (9, 6), (30, 16)])
@pytest.mark.parametrize("length", [3, 4, 5, 17, 64, 65, 90])
def test_a_prefix_is_found_with_its_sink_and_its_window(window, sink, length):
    kept, tokens = manager(window_spec(window, sink)), list(range(length))
    for _ in run(kept, first := request("first", tokens), 16):
        pass
    blocks = list(kept.coordinator.single_type_managers[WINDOWS].req_to_blocks["first"])
    kept.free(first)
    again = request("again", [*tokens, 7, 8, 9])
    _, cached, _ = kept.get_computed_blocks(again)
    assert cached == length // BLOCK * BLOCK
    for _ in run(kept, again, 16):
        break
    needed = seen(window, sink, cached, length + 2)
    assert held(kept, again) >= needed
    shared = kept.coordinator.single_type_managers[WINDOWS].req_to_blocks["again"]
    assert all(shared[number] is blocks[number] for number in needed if number < cached // BLOCK)
    kept.free(again)
    assert kept.usage == 0


@pytest.mark.parametrize("gone", ["the sink", "the window"])
def test_a_prefix_is_not_found_without_its_sink_or_its_window(gone):
    kept, tokens = manager(window_spec(6, 4)), list(range(64))
    for _ in run(kept, first := request("first", tokens), 16):
        pass
    blocks = kept.coordinator.single_type_managers[WINDOWS].req_to_blocks["first"]
    evicted = blocks[0] if gone == "the sink" else blocks[15]
    kept.free(first)
    kept.evict_blocks({evicted.block_id})
    _, cached, _ = kept.get_computed_blocks(request("again", [*tokens, 7]))
    assert cached == 0 if gone == "the sink" else cached < 64


def test_a_full_pool_is_given_back_whatever_comes_and_goes():
    """Requests of every kind, found again, cut off and resumed; nothing leaks and nothing is taken twice."""
    chosen = random.Random(0)
    kept = manager(window_spec(9, 5), blocks=120)
    alive: dict[str, tuple[Request, object]] = {}
    stems = [[chosen.randrange(50) for _ in range(100)] for _ in range(3)]
    for number in range(400):
        if len(alive) < 3:
            stem = chosen.choice(stems)[: chosen.randrange(1, 100)]
            asked = request(str(number), [*stem, *(chosen.randrange(50) for _ in range(chosen.randrange(1, 30)))])
            alive[str(number)] = asked, run(kept, asked, chosen.choice([1, 4, 16]))
        name = chosen.choice(list(alive))
        asked, steps = alive[name]
        try:
            ended = next(steps, "ended") == "ended"
        except AssertionError:  # the pool is full
            ended = True
        if ended or chosen.random() < 0.1:
            kept.free(asked)
            del alive[name]
        owned = [
            block.block_id
            for each, _ in alive.values()
            for group in (FULL, WINDOWS)
            for block in kept.coordinator.single_type_managers[group].req_to_blocks.get(each.request_id, [])
            if not block.is_null
        ]
        assert kept.block_pool.get_num_free_blocks() == 119 - len(set(owned))
    for asked, _ in alive.values():
        kept.free(asked)
    assert kept.usage == 0


def hits(kept, conversations, turns):
    """What part of the prompts of conversations that take turns is found again; and all their tokens."""
    chosen = random.Random(0)
    texts = [[chosen.randrange(1_000) for _ in range(20)] for _ in range(conversations)]
    found = asked = 0
    for turn in range(turns):
        for number in chosen.sample(range(conversations), conversations):
            texts[number] += [chosen.randrange(1_000) for _ in range(chosen.randrange(5, 30))]
            one = request(f"{turn} {number}", list(texts[number]))
            if turn:
                found += kept.get_computed_blocks(one)[1]
                asked += one.num_tokens
            for _ in run(kept, one, 16):
                pass
            for _ in range(chosen.randrange(10, 40)):  # the answer
                one.append_output_token_ids(chosen.randrange(1_000))
                assert kept.allocate_slots(one, 1) is not None
                one.num_computed_tokens += 1
            texts[number] = list(one.all_token_ids)
            kept.free(one)
    return found / asked, sum(map(len, texts))


@pytest.mark.parametrize("occupied", [0.5, 0.8, 1.0, 1.3])
def test_conversations_find_their_earlier_turns_as_often_as_stocks(occupied):
    """In the same memory, which is three times as many blocks of a third of the layers; and more often where stock's
    is too small, since windows leave room.
    """
    window = window_spec(16, 4)
    _, tokens = hits(manager(blocks=10_000, longest=10_000), 8, 6)
    blocks = int(tokens / BLOCK / occupied)
    stock, _ = hits(manager(blocks=blocks + 1, longest=10_000), 8, 6)
    ours, _ = hits(manager(window, window, blocks=3 * blocks + 1, longest=10_000), 8, 6)
    assert ours > stock - 0.02
    assert ours > stock + 0.02 or occupied <= 1


def test_vllm_knows_the_spec_by_its_registry():
    spec = window_spec(8, 4)
    assert KVCacheSpecRegistry.get_manager_class(spec) is SinkWindowManager
    assert KVCacheSpecRegistry.get_manager_class(FullAttentionSpec(**COMMON)) is not None
    same, other = window_spec(8, 4), window_spec(8, 5)
    assert spec.is_uniform_with_collection({"a": spec, "b": same})
    assert not spec.is_uniform_with_collection({"a": spec, "b": other})
    assert not spec.is_uniform_with_collection({"a": spec, "b": SlidingWindowSpec(**COMMON, sliding_window=8)})
