"""Window layers in vLLM against attention written out in full."""

import pytest
import torch
from vllm import SamplingParams

from model_executors.attention_plan import LayerPlan
from tests.answers import assert_same
from tests.engines import NEW_TOKENS, answers, engine, outputs, runner
from tests.reference import Reference, fp8, fp8_cut
from tests.tiny import prompts

# Around the sinks, the windows, both together, and vLLM's block of 128 tokens; answers go on over each.
LENGTHS = (1, 2, 3, 4, 5, 13, 15, 16, 17, 19, 20, 21, 35, 36, 37, 121, 127, 128, 129, 131, 132, 133, 143, 144, 145, 200)
# Gemma's even layers have a sliding window of their own.
PLAN = {1: LayerPlan("window", 16), 3: LayerPlan("window", 128), 5: LayerPlan("window", 20, sink=16)}


@pytest.mark.parametrize("family", ["Llama", "Gemma2"])
def test_equals_the_reference(tiny_models, family):
    """Then once more, when the first block of long prompts is found again, and with it where their windows begin."""
    folder = tiny_models(family)
    reference = Reference(folder, PLAN)
    expected = [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)]
    with engine(folder, PLAN) as llm:
        assert_same(answers(llm, prompts(LENGTHS)), expected)
        again = outputs(llm, prompts(LENGTHS), NEW_TOKENS, prompt_logprobs=False)
    assert [list(output.outputs[0].token_ids) for output in again] == [answer.tokens for answer in expected]
    assert [output.num_cached_tokens for output in again] == [(length - 1) // 128 * 128 for length in LENGTHS]


def test_chunked_prefill(tiny_models):
    """Windows reach back over chunks of 16 tokens, one after another; their layers are two groups of the KV cache."""
    plan = dict.fromkeys((1, 2, 4, 5), LayerPlan("window", 16))
    folder = tiny_models("Llama")
    reference = Reference(folder, plan)
    with engine(folder, plan, max_num_batched_tokens=16, max_num_seqs=8, enable_chunked_prefill=True) as llm:
        ours = answers(llm, prompts(LENGTHS))
        assert len(runner(llm).kv_cache_config.kv_cache_groups) == 3
    assert_same(ours, [reference.answer(prompt, NEW_TOKENS) for prompt in prompts(LENGTHS)])


AVX512 = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="stock refuses an FP8 KV cache without AVX-512"
)


def held_as_fp8(numbers, layer):
    """vLLM's kernel for CPUs rounds towards zero, that of windows to the nearest."""
    return fp8(numbers) if layer.kind == "window" else fp8_cut(numbers)


def missed(ours, theirs):
    """Nats of a prompt's token, on average."""
    misses = [
        abs(one - other)
        for a, b in zip(ours, theirs, strict=True)
        for one, other in zip(a.prompt_logprobs, b.prompt_logprobs, strict=True)
    ]
    return sum(misses) / len(misses)


@AVX512
def test_fp8_costs_a_plan_what_it_costs_stock(tiny_models):
    """Nats of a prompt's token, on average; beside a reference that holds its keys and values in FP8, next to none."""
    folder, asked = tiny_models("Llama"), prompts((121, 129, 145, 200))
    lost = {}
    for name, changes in (("stock", {}), ("plan", PLAN)):
        with engine(folder, changes, kv_cache_dtype="fp8") as llm:
            ours = answers(llm, asked)
        reference = Reference(folder, changes)
        expected = [reference.answer(prompt, NEW_TOKENS) for prompt in asked]
        lost[name] = missed(ours, expected)
        reference.held = held_as_fp8
        assert missed(ours, [reference.answer(prompt, NEW_TOKENS) for prompt in asked]) < 2e-2
    assert lost["stock"] > 0
    assert lost["plan"] == pytest.approx(lost["stock"], rel=0.2)


@AVX512
def test_fp8_beside_frozen_layers(tiny_models):
    folder, asked = tiny_models("Llama"), prompts((2, 16, 17, 121, 129, 145))
    plan = {1: LayerPlan("window", 16), 3: LayerPlan("freeze"), 4: LayerPlan("freeze"), 5: LayerPlan("freeze")}
    reference = Reference(folder, plan)
    reference.held = held_as_fp8
    with engine(folder, plan, kv_cache_dtype="fp8") as llm:
        ours = answers(llm, asked, prompt_logprobs=False)
    expected = [reference.answer(prompt, NEW_TOKENS) for prompt in asked]
    assert_same(ours, expected, 2e-2, prompt_logprobs=False)


def test_memory_is_freed_as_tokens_leave_the_window(tiny_models):
    """Of a long answer, window layers hold three blocks at most; the usage that /metrics shows says so too."""
    windows = dict.fromkeys([3, 4, 5], LayerPlan("window", 128))
    folder = tiny_models("Llama")
    (prompt,) = prompts((8,))
    held, capacity = {}, {}
    for name, changes in {"stock": {}, "windows": windows}.items():
        with engine(
            folder,
            changes,
            hf_overrides={"max_position_embeddings": 4096},
            max_model_len=4096,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=2**26,
            disable_log_stats=False,
            enable_prefix_caching=False,
        ) as llm:
            sampling = SamplingParams(temperature=0, max_tokens=500, ignore_eos=True, detokenize=False)
            llm.llm_engine.add_request("long", {"prompt_token_ids": prompt}, sampling)
            blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks - 1  # one is vLLM's own
            held[name] = []
            while llm.llm_engine.has_unfinished_requests():
                llm.llm_engine.step()
                (usage,) = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:kv_cache_usage_perc"]
                held[name].append(usage * blocks)
            capacity[name] = llm.llm_engine.vllm_config.cache_config.kv_cache_max_concurrency
            groups = runner(llm).kv_cache_config.kv_cache_groups
    assert sorted(len(group.layer_names) for group in groups) == [3, 3]
    # 508 tokens are 4 blocks of 128. A planned block is of three layers, half as large: 4 for the full ones, and for
    # the windows never more than the first and the 2 that a window can touch.
    assert max(held["stock"]) == pytest.approx(4)
    assert max(held["windows"]) == pytest.approx(4 + 3)
    # By vLLM's reckoning: 32 blocks a request for each of six layers, against 32 for three layers and 5 for three: the
    # first, 127 + 256 tokens' of the window and of the batch under way, and one where these begin.
    assert capacity["windows"] / capacity["stock"] == pytest.approx(6 * 32 / (3 * (32 + 5)), rel=0.03)


def test_a_pool_of_little_more_than_one_request_never_stops(tiny_models):
    """Requests of every length wait for each other and are preempted; alone, each is prefilled in steps that fit."""
    windows = dict.fromkeys([3, 4, 5], LayerPlan("window", 16))
    asked = prompts((2030, 1, 100, 500, 2030, 1000, 1500, 130, 2030))
    told = []
    # 16 blocks of 128 for the full layers, and for the windows the first, 15 + 2 x 64 tokens' and one; one is vLLM's.
    for blocks in (16 + 4 + 1, 500):
        with engine(
            tiny_models("Llama"),
            windows,
            hf_overrides={"max_position_embeddings": 2048},
            max_model_len=2048,
            max_num_batched_tokens=2048,
            long_prefill_token_threshold=64,
            num_gpu_blocks_override=blocks,
        ) as llm:
            told.append([answer.tokens for answer in answers(llm, asked, prompt_logprobs=False)])
            assert llm.llm_engine.vllm_config.cache_config.num_gpu_blocks == blocks
    assert told[0] == told[1]


def test_what_is_computed_at_once_is_bounded_where_the_user_has_not(tiny_models):
    """And what a request is charged with follows: with vLLM's batch of 8,192 tokens, windows hold what they promise."""
    windows = dict.fromkeys([1, 2, 4, 5], LayerPlan("window", 128))
    held = {}
    for changes in ({}, windows):
        for length in (8192, 16384):
            config = {"max_position_embeddings": length, "num_hidden_layers": 6}
            with engine(
                tiny_models("Llama"),
                changes,
                hf_overrides=config,
                max_model_len=length,
                max_num_batched_tokens=8192,
                block_size=32,
                kv_cache_memory_bytes=2**28,
            ) as llm:
                settings = llm.llm_engine.vllm_config
                assert settings.scheduler_config.long_prefill_token_threshold == (2048 if changes else 0)
                held[len(changes), length] = settings.cache_config.kv_cache_max_concurrency
    assert held[4, 8192] / held[0, 8192] > 1.4
    assert held[4, 16384] / held[0, 16384] > 1.9
