"""Which of vLLM's arguments are refused, wherever they are written, and what a CPU is given where nobody says."""

from argparse import Namespace

import pytest

from tests.command import refused
from vllm_ext.process import free_port


@pytest.fixture
def refuse(tiny_models, monkeypatch):
    """The complaint about a server of a tiny model with these options, on a port that is free."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE")

    def ask(*options: object, port: int | None = None) -> str:
        at = ["--port", port or free_port()] if "--port" not in options else []
        return refused("serve", tiny_models("Llama"), "--skip-tokenizer-init", *at, *options)

    return ask


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prot", 8000], "--prot: no such option; did you mean --port?"),
        (["--max-body-byte=1"], "--max-body-byte: no such option; did you mean --max-body-bytes?"),
        (["--xyzzy"], "--xyzzy: no such option; see"),
        (["stray"], "stray: it belongs to no option"),
        (["--max-model-len", "many"], "--max-model-len: "),
        (["--port", 99999], "--port 99999: no such port"),
        (["--block-size", 16], "--block-size 16: on a CPU it is a multiple of 32; take 32"),
        (["--block-size", 100], "--block-size 100: on a CPU it is a multiple of 32; take 96"),
        (["--tool-call-parser", "none-such", "--enable-auto-tool-choice"], "invalid tool call parser: none-such"),
        (["--config", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--max-model-len", 4096], "max_model_len"),
    ],
)
def test_refuses(refuse, options, message):
    assert message in refuse(*options)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("port: 99999", "--port 99999: no such port"),
        ("api-key: secret", "--api-key: whoever lists processes"),
        ("trust-remote-code: true", "add --allow-code-from-checkpoint"),
        ("load-format: pt", "convert them to safetensors"),
        ("block-size: 48", "--block-size 48: on a CPU it is a multiple of 32; take 64"),
        ("prot: 8000", "--prot: no such option; did you mean --port?"),
        ("a: [", "expected the node content"),
    ],
)
def test_refuses_the_same_in_a_config_file(tiny_models, tmp_path, written, message):
    (tmp_path / "vllm.yaml").write_text(written + "\n")
    assert message in refused("serve", tiny_models("Llama"), "--config", tmp_path / "vllm.yaml")


def test_refuses_a_port_for_two(refuse):
    port = free_port()
    assert "it is the server's own" in refuse("--metrics-port", port, port=port)


def test_refuses_two_sizes_of_the_kv_cache(refuse, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert "VLLM_CPU_KVCACHE_SPACE=1 would override it" in refuse("--kv-cache-memory-bytes", 2**28)
    for space in ("0", "1.5", "much", "²"):
        monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", space)
        assert f"VLLM_CPU_KVCACHE_SPACE={space}: it is a whole number of GiB" in refuse()


def test_a_cpu_is_given_what_it_can_serve_with(monkeypatch):
    from serving import cpu

    monkeypatch.delenv(cpu.SPACE)
    for fast in ("auto", "float32"):
        monkeypatch.setattr(cpu, "fast_dtype", lambda fast=fast: fast)
        args = Namespace(dtype="auto", kv_cache_memory_bytes=None)
        cpu.set_defaults(args)
        assert args == Namespace(dtype=fast, kv_cache_memory_bytes=2**30)
    args = Namespace(dtype="bfloat16", kv_cache_memory_bytes=2**20)
    cpu.set_defaults(args)
    assert args == Namespace(dtype="bfloat16", kv_cache_memory_bytes=2**20)
    monkeypatch.setenv(cpu.SPACE, "3")
    args = Namespace(dtype="float16", kv_cache_memory_bytes=None)
    cpu.set_defaults(args)
    assert args.kv_cache_memory_bytes is None


def test_refuses_a_key_that_no_header_can_carry(refuse, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "schlüssel")
    message = refuse()
    assert "VLLM_API_KEY has U+00FC in its key" in message
    assert "schl" not in message
