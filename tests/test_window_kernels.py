"""Window layers' attention by itself: what each device's kernels make of a step, against attention written out.

The kernels for GPUs run in Triton's interpreter, in a process of its own (`python -m tests.test_window_kernels`), which
proves their arithmetic; and Triton's compiler makes a GPU's code of them (`... 90` for compute capability 9.0), which
nothing here runs.
"""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.triton_interpreter import interpret, let_vllm_find_triton

KV_HEADS, GROUPS, SIZE, SCALE = 2, 2, 32, 0.3
# Of each request of a step, how many tokens are computed already, and how many are new.
DECODE = ((0, 1), (5, 1), (15, 1), (19, 1), (20, 1), (100, 1))
MIXED = ((0, 1), (100, 1), (0, 100), (50, 5), (3, 70), (31, 33), (200, 1), (63, 1), (0, 20), (5, 16), (0, 94), (0, 95))
SPECULATED = ((60, 5), (16, 4), (200, 8))


def step(requests, window, sink, block, dtype, write, softcap=0.0):
    """A step's block tables, bounds, lengths and queries, after `write` has put keys and values into the cache; and
    what it is to answer. What lies between sink and window when the step begins is given back: its blocks are block 0.
    """
    chosen = torch.Generator().manual_seed(0)
    blocks = iter((torch.randperm(199, generator=chosen) + 1).tolist())
    table = torch.zeros(len(requests), 24, dtype=torch.int32)
    bounds, queries, expected = [0], [], []
    for number, (computed, new) in enumerate(requests):
        length = computed + new
        for each in range(-(-length // block)):
            table[number, each] = next(blocks)
        key, value = (torch.randn(length, KV_HEADS, SIZE, generator=chosen).to(dtype) for _ in range(2))
        query = torch.randn(new, KV_HEADS * GROUPS, SIZE, generator=chosen).to(dtype)
        place = torch.arange(length)
        write(key, value, table[number].long()[place // block] * block + place % block)
        sink_blocks = -(-sink // block)
        table[number, sink_blocks : max(sink_blocks, (computed - window + 1) // block)] = 0
        for token in range(computed, length):
            seen = [other for other in range(token + 1) if other < sink or other > token - window]
            keys, values = (part[seen].float().repeat_interleave(GROUPS, 1) for part in (key, value))
            scores = torch.einsum("hd,khd->hk", query[token - computed].float(), keys) * SCALE
            if softcap:
                scores = (scores / softcap).tanh() * softcap
            expected.append(torch.einsum("hk,khd->hd", scores.softmax(-1), values))
        queries.append(query)
        bounds.append(bounds[-1] + new)
    common = SimpleNamespace(
        query_start_loc=torch.tensor(bounds, dtype=torch.int32),
        seq_lens=torch.tensor([sum(each) for each in requests], dtype=torch.int32),
        num_reqs=len(requests),
        num_actual_tokens=bounds[-1],
        max_query_len=max(new for _, new in requests),
        max_seq_len=max(sum(each) for each in requests),
        block_table_tensor=table,
        slot_mapping=None,
        causal=True,
        mm_req_doc_ranges=None,
        rswa_prefix_lens=None,
    )
    return common, torch.cat(queries), torch.stack(expected)


def spec(window, sink, block, dtype):
    from model_executors.hooks.kv_cache import SinkWindowSpec

    shape = {"block_size": block, "num_kv_heads": KV_HEADS, "head_size": SIZE, "dtype": dtype}
    return SinkWindowSpec(**shape, sliding_window=window, sink=sink, in_flight_tokens=1)


@pytest.mark.parametrize("requests", [DECODE, MIXED, SPECULATED], ids=["decode", "mixed", "speculated"])
@pytest.mark.parametrize(("window", "sink"), [(1, 1), (5, 5), (16, 4), (20, 16), (90, 4)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "bfloat16 packed", "fp8", "fp8_e5m2"])
def test_on_a_cpu(requests, window, sink, softcap, kind):
    from model_executors.layers.window_cpu import WindowImpl, WindowMetadataBuilder

    dtype = torch.bfloat16 if kind.startswith("bfloat16") else torch.float32
    held = kind if kind.startswith("fp8") else "auto"
    layer = SimpleNamespace(_k_scale_float=0.5, _v_scale_float=2.0)
    shape = KV_HEADS * GROUPS, SIZE, SCALE, KV_HEADS
    impl = WindowImpl(*shape, None, window, held, softcap)
    cache = torch.zeros(200, KV_HEADS, 32, 2 * SIZE, dtype=dtype if held == "auto" else torch.uint8)

    def write(key, value, slots):
        impl.do_kv_cache_update(layer, key, value, cache, slots)
        if held != "auto":  # so that the answers are those to what is held
            kept = impl.rows(cache)[slots].float()
            key.copy_(kept[..., :SIZE] * layer._k_scale_float)
            value.copy_(kept[..., SIZE:] * layer._v_scale_float)

    common, query, expected = step(requests, window, sink, 32, dtype, write, softcap)
    builder = WindowMetadataBuilder(spec(window, sink, 32, dtype), [], None, torch.device("cpu"))
    builder.has_kernel &= kind == "bfloat16"  # without AVX-512 there is none
    metadata = builder.build(0, common)
    output = torch.full_like(query, torch.nan)
    impl.forward(layer, query, None, None, cache, metadata, output)
    torch.testing.assert_close(output.float(), expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-4, rtol=1e-2)

    # The same for another group of layers, whose blocks are others.
    other = common.block_table_tensor.flip(0)
    updated = builder.update_block_table(metadata, other, None)
    common.block_table_tensor = other
    again = builder.build(0, common)
    for name in ("singles", "pieces"):
        ours, theirs = getattr(updated, name), getattr(again, name)
        assert (ours is None) is (theirs is None)
        assert ours is None or ours.slots.equal(theirs.slots)


def test_what_has_no_slot_is_not_kept():
    from model_executors.layers.window_cpu import WindowImpl

    impl = WindowImpl(KV_HEADS * GROUPS, SIZE, SCALE, KV_HEADS, None, 8)
    cache = torch.zeros(3, KV_HEADS, 32, 2 * SIZE)
    token = torch.ones(2, KV_HEADS, SIZE)
    impl.do_kv_cache_update(None, token, token, cache, torch.tensor([-1, 40]))
    assert impl.rows(cache)[40].eq(1).all()
    assert impl.rows(cache)[32:].sum() == impl.rows(cache)[40].sum()  # block 0 is nobody's


def _apart(*asked: str) -> list[str]:
    """What this file prints as a program."""
    settings = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, "-m", "tests.test_window_kernels", *asked]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()


def test_on_a_gpu():
    """In Triton's interpreter."""
    assert _apart()[-1] == "14"


@pytest.mark.parametrize(
    ("capability", "room"),
    [
        pytest.param("90", 227, id="H100"),
        pytest.param("80", 163, id="A100", marks=pytest.mark.nightly),
        pytest.param("100", 227, id="B200", marks=pytest.mark.nightly),
    ],
)
def test_a_gpus_compiler_takes_them(capability, room, tmp_path, monkeypatch):
    """Down to the GPU's own code, in the KiB of shared memory that it has for a kernel."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = _apart(capability)
    assert kernels.count("kernel_unified_attention") == (4 if capability == "80" else 8)
    assert max(int(each) for each in kernels if each.isdigit()) <= room * 1024


def _window_on_a_gpu(window: int, sink: int, dtype: torch.dtype, held: str = "auto"):
    """What prepares a step, and what attends."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backends import triton_attn

    from model_executors.layers.window_triton import WindowImpl, WindowMetadataBuilder

    triton_attn.get_num_attention_heads_from_layers = lambda *_: KV_HEADS * GROUPS
    model = SimpleNamespace(
        get_num_attention_heads=lambda _: KV_HEADS * GROUPS,
        get_num_kv_heads=lambda _: KV_HEADS,
        get_head_size=lambda: SIZE,
        rswa_window=None,
    )
    config = SimpleNamespace(
        model_config=model,
        parallel_config=None,
        compilation_config=SimpleNamespace(cudagraph_mode=CUDAGraphMode.NONE),
        scheduler_config=SimpleNamespace(max_num_seqs=16),
    )
    builder = WindowMetadataBuilder(spec(window, sink, 16, dtype), [], config, torch.device("cpu"))
    return builder, WindowImpl(KV_HEADS * GROUPS, SIZE, SCALE, KV_HEADS, None, window, held)


def _scaled(scale: float) -> SimpleNamespace:
    """A layer, as kernels ask it how FP8 is scaled."""
    one = torch.ones(1)
    return SimpleNamespace(_k_scale=one * scale, _v_scale=one / scale, _q_scale=one)


def _interpreted() -> int:
    """Compare what the kernels for GPUs make of some steps; returns of how many."""
    interpret()
    windows = ((1, 1), (5, 5), (16, 4), (20, 16), (90, 4))
    compared = 0
    for (window, sink), held in (*((each, "auto") for each in windows), ((16, 4), "fp8"), ((90, 4), "fp8")):
        builder, impl = _window_on_a_gpu(window, sink, torch.float32, held)
        for requests in (DECODE, (*SPECULATED, (33, 20), (100, 1))):
            _compare(requests, window, sink, builder, impl)
            compared += 1
    return compared


def _compare(requests, window, sink, builder, impl) -> None:
    is_fp8 = impl.kv_cache_dtype == "fp8"
    layer = _scaled(0.5 if is_fp8 else 1.0)
    cache = torch.zeros(200, KV_HEADS, 16, 2 * SIZE, dtype=torch.float8_e4m3fn if is_fp8 else torch.float32)

    def write(key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor) -> None:
        kept = torch.cat((key / layer._k_scale, value / layer._v_scale), -1).to(cache.dtype)
        cache[slots // 16, :, slots % 16] = kept
        key.copy_(kept[..., :SIZE].float() * layer._k_scale)  # so that the answers are those to what is held
        value.copy_(kept[..., SIZE:].float() * layer._v_scale)

    common, query, expected = step(requests, window, sink, 16, torch.float32, write)
    lengths = common.seq_lens.clone()
    metadata = builder.build(0, common)
    output = torch.full_like(query, torch.nan)
    impl.forward(layer, query, None, None, cache.view(torch.uint8) if is_fp8 else cache, metadata, output)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-4)
    # No more is read than the sink's block, the window with what it begins in, and the new tokens.
    new = common.query_start_loc.diff()
    assert (metadata.seq_lens <= torch.minimum(lengths, 16 + window + 15 + new)).all()
    assert metadata.seq_lens.data_ptr() == builder.seq_lens.data_ptr()


def _compiled(capability: int) -> None:
    """Compile what decodes and what prefills, in bfloat16 and, where vLLM has it, with fp8 KV; print each kernel and
    its bytes of shared memory.
    """
    global SIZE
    let_vllm_find_triton()
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    target, launch = GPUTarget("cuda", capability, 32), JITFunction.run
    here = {"get_current_device": lambda: 0, "get_current_stream": lambda _: 0, "get_current_target": lambda: target}
    driver.set_active(SimpleNamespace(**here))

    def compiled(kernel: JITFunction, *args: object, grid: object, warmup: bool, **named: object) -> None:
        made = launch(kernel, *args, grid=grid, warmup=True, **named)
        assert made.asm["cubin"]
        print(made.name, made.metadata.shared)

    JITFunction.run = compiled
    for SIZE in (64, 128):
        for held in ("auto", "fp8") if capability >= 89 else ("auto",):
            builder, impl = _window_on_a_gpu(1024, 4, torch.bfloat16, held)
            for requests in (DECODE, MIXED):
                cache = torch.zeros(200, KV_HEADS, 16, 2 * SIZE, dtype=torch.uint8 if held == "fp8" else torch.bfloat16)
                common, query, _ = step(requests, 90, 4, 16, torch.bfloat16, lambda *_: None)
                impl.forward(_scaled(1.0), query, None, None, cache, builder.build(0, common), torch.empty_like(query))


if __name__ == "__main__":
    _compiled(int(sys.argv[1])) if sys.argv[1:] else print(_interpreted())
