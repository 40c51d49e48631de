"""`vllm-ext bench`: what it refuses, and one run of it."""

import json
from types import SimpleNamespace

import pytest
import torch

from model_executors.attention_plan import AttentionPlan, LayerPlan
from model_executors.heads.head_plan import HeadPlan
from tests.command import vllm_ext
from vllm_ext.bench import run as bench_run
from vllm_ext.bench.command import Pair, measure
from vllm_ext.bench.machine import SIZES, Machine, Sizes
from vllm_ext.bench.machine import measured as measured_machine
from vllm_ext.bench.report import Row, interval, rows
from vllm_ext.bench.run import BenchSettings, Candidate, Round, rounds
from vllm_ext.bench.shapes import SHAPES, write_shape
from vllm_ext.bench.work import Work
from vllm_ext.bench.worker import Bench
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.cli.bench import app
from vllm_ext.costs import Step
from vllm_ext.errors import UsageError
from vllm_ext.served import Served


def test_work_as_it_is_typed():
    assert Work.parse("prefill:1024") == Work("prefill", prompt=1024)
    assert Work.parse("decode:8x128") == Work("decode", streams=8, context=128)
    assert Work.parse("mixed:8x128+512") == Work("mixed", 512, 8, 128)
    for text in ("prefill:1024", "decode:8x128", "mixed:8x128+512"):
        assert str(Work.parse(text)) == text
    assert Work.parse("mixed:2x9+5").steps == [Step(5, 0, True), Step(1, 11, False), Step(1, 11, False)]


def test_requests_outlast_the_steps_that_are_timed():
    assert Work.parse("prefill:1024").longest(3) == 1025
    assert Work.parse("decode:8x128").longest(3) == 128 + 4 + 8 + 32
    assert Work.parse("mixed:8x128+64").longest(3) == 128 + 4 + 8 + 24
    assert Work.parse("mixed:8x16+512").longest(3) == 513


@pytest.mark.parametrize("text", ["prefill", "prefill:0", "decode:8", "decode:0x9", "mixed:8x9", "mixed:1x1+0"])
def test_refuses_work_that_cannot_be(text):
    with pytest.raises(UsageError, match=f"--work {text.split('+')[0]}"):
        Work.parse(text)


def test_the_share_is_of_the_gain():
    assert Row("prefill:64", "ms", 300, 200, 1.5, None, ideal=2).share == 0.75
    assert Row("peak memory", "GiB", 3, 2, 1.5, None).share is None


def test_intervals_are_over_rounds():
    assert interval([1.5], 0) is None
    low, high = interval([1.4, 1.5, 1.7], 0)
    assert 1.4 <= low < 1.5 < high <= 1.7


def test_what_was_interleaved_is_compared_step_by_step(tiny_models):
    """The machine changes its speed amidst the second pair. That pair is off, and so are the medians of each side."""
    source = Checkpoint.open(str(tiny_models("Llama")), weights=False)
    plans = AttentionPlan.of(source.num_layers), (HeadPlan(), HeadPlan()), Machine(1e9, 1e9)
    known = {"start_seconds": 1, "peak_bytes": 1, "kv_capacity_tokens": 1, "max_model_len": 128, "element_bytes": 4}
    measured = {
        name: [Round(seconds={"prefill:16": seconds}, **known)]
        for name, seconds in (("stock", [1, 4, 4]), ("variant", [1, 1, 4]))
    }
    for interleaved, gain in ((True, 1), (False, 4)):
        settings = BenchSettings(("prefill:16",), interleaved=interleaved)
        assert rows(measured, Pair.of(source.name).shape, *plans, settings)[0].gain == gain


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_are_configurations_of_known_families(tmp_path, name):
    parameters = {"llama-3.1-8b": 6979, "llama-3.2-1b": 973, "qwen2.5-0.5b": 358, "gemma-3-270m": 100}
    shape = Pair.of_shape(name, tmp_path).shape
    assert round(sum(each.attention + each.mlp for each in shape.layers) / 1e6) == parameters[name]
    planned = Checkpoint.open(str(write_shape(name, tmp_path / "p", {5: LayerPlan("skip")})), weights=False)
    assert planned.plan.skipped == [5]


@pytest.mark.parametrize("text", ["prefill:32768", "decode:1x16384", "decode:256x128", "mixed:200x128+512"])
def test_work_for_large_gpus_is_accepted(tmp_path, text):
    pair = Pair.of_shape("llama-3.1-8b", tmp_path, {31: LayerPlan("skip")})
    for candidate in pair.candidates(BenchSettings((text,)), ()).values():
        args = dict(zip(candidate.vllm_args, candidate.vllm_args[1:], strict=False))
        assert int(args["--max-model-len"]) >= Work.parse(text).longest(3)
        assert int(args.get("--max-num-seqs", 128)) > Work.parse(text).streams


def test_streams_that_do_not_fit_are_not_timed():
    answered = SimpleNamespace(request_id="1", outputs=[SimpleNamespace(token_ids=[5])])
    stub = SimpleNamespace(
        model_config=SimpleNamespace(get_vocab_size=lambda: 99),
        add_request=lambda *_: None,
        step=lambda: [answered, SimpleNamespace(request_id="2", outputs=answered.outputs)][: 2 - slow.pop()],
    )
    slow = [1, 0, 0, 0]  # all get their first tokens, and then one waits
    with pytest.raises(
        ValueError, match="--work decode:2x9: of 2 streams only 1 fit in the KV cache or in --max-num-seqs"
    ):
        next(Bench(stub, 0).time(Work.parse("decode:2x9"), 1))


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
        ),
    ],
)
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_the_roof_is_what_the_device_reaches(monkeypatch, device, element_bytes):
    monkeypatch.setitem(SIZES, "cpu", Sizes(64, 64, 64, 2**20))
    roof = measured_machine(element_bytes, device)
    assert roof.flops > (1e13 if device == "cuda" else 1e6)
    assert roof.bandwidth > (5e11 if device == "cuda" else 1e6)


def test_refuses_what_cannot_be_measured(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the commands run in this process
    llama = tiny_models("Llama")
    done = vllm_ext("bench", "--shape", "gpt", "--skip", "5", "--enforce-eager")
    assert done.returncode == 2
    assert done.stderr.startswith("error: --shape gpt: no such shape; use one of llama-3.1-8b, ")
    assert done.stdout == ""
    for arguments, told in (
        ((llama,), "bench needs either --planned, or some of --skip, --window, --freeze and --head"),
        (("--skip", "5"), "bench needs either a MODEL or a --shape"),
        (("--shape", "qwen2.5-0.5b", "--skip", "99"), "layer 99 does not exist"),
        (("--shape", "qwen2.5-0.5b", "--planned", llama), "it is for a checkpoint, and a --shape is of random weights"),
        (
            ("--shape", "qwen2.5-0.5b", "--head", "character", "--agreement", "0.98"),
            "--agreement 0.98: it is for a check",
        ),
        ((llama, "--skip", "5", "--consolidation", "bias"), "--consolidation bias: it needs fitted tensors"),
        ((llama, "--skip", "5", "--work", "prefill:512"), "grow to 513 tokens, and the model takes 512; choose less"),
        ((llama, "--skip", "5", "--work", "walk:3"), "--work walk:3: write it as prefill:1024"),
        ((llama, "--skip", "5", "--json", tmp_path / "no" / "file"), "no such folder"),
        ((llama, "--planned", llama, "--work", "prefill:64"), "it has no attention plan"),
    ):
        with pytest.raises(UsageError) as refused:
            app([*map(str, arguments)])
        assert told in str(refused.value)


def test_measures_and_ends_with_json(tiny_models, tmp_path):
    """One round with little work: the times mean nothing, but there are as many as were asked for."""
    work = ["prefill:64", "decode:2x16", "mixed:2x16+32"]
    options = [option for each in work for option in ("--work", each)]
    settings = ["--rounds", 1, "--repeats", 2, "--enforce-eager", "--dtype", "float32", "--json", tmp_path / "out.json"]
    done = vllm_ext("bench", tiny_models("Llama"), "--skip", "4-5", *options, *settings)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == [*work, "start-up", "peak memory", "KV-cache capacity"]
    for turns in report["rounds"].values():
        assert {name: len(seconds) for name, seconds in turns[0]["seconds"].items()} == dict(
            zip(work, (2, 32, 2), strict=True)
        )
        assert turns[0]["element_bytes"] == 4
    assert all(row["stock"] > 0 and row["variant"] > 0 for row in rows.values())
    # Two of six layers hold no cache; each capacity is of whole blocks of 128 tokens.
    assert rows["KV-cache capacity"]["ideal"] == 1.5
    assert rows["KV-cache capacity"]["gain"] == pytest.approx(1.5, rel=0.01)
    assert rows["prefill:64"]["share"] == pytest.approx(rows["prefill:64"]["gain"] / rows["prefill:64"]["ideal"])
    assert "share: the gain by the ideal one" in " ".join(done.stdout.split())


@pytest.mark.parametrize("head", [pytest.param("character", marks=pytest.mark.nightly), "rescored"])
def test_a_shape_with_character_heads(head, tmp_path, monkeypatch):
    """Its weights are written, at random; a small shape stands in for the models' own, which take minutes."""
    small = {"vocab_size": 2048, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    monkeypatch.setitem(
        SHAPES, "small", SHAPES["llama-3.2-1b"] | small | {"num_attention_heads": 2, "num_key_value_heads": 1}
    )
    settings = BenchSettings(("decode:2x16",), 1, 1)
    options = ["--enforce-eager", "--dtype", "float32"]
    pair = Pair.of_shape("small", tmp_path, None, head, described=f"--head {head}")
    found, made = measure(pair, settings, options)
    rows = {row.name: row for row in found}
    assert rows["decode:2x16"].stock > 0
    assert rows["decode:2x16"].variant > 0
    assert rows["KV-cache capacity"].gain == 1
    assert made["variant"] == f"--head {head}"
    with pytest.raises(UsageError, match=f"--shape with --head {head}: measure a plan's layers by themselves"):
        Pair.of_shape("small", tmp_path / "other", {1: LayerPlan("skip")}, head)


def test_prompts_are_cut_from_prose_where_there_is_some():
    engine = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 50))
    prose = list(range(100, 140))
    for bench, known in ((Bench(engine, 0, prose), set(prose)), (Bench(engine, 0), set(range(50)))):
        prompts = [bench.prompt(length) for length in (1, 7, 40)]
        assert [len(prompt) for prompt in prompts] == [1, 7, 40]
        assert all(set(prompt) <= known for prompt in prompts)
    first, second = (Bench(engine, 0, prose).prompt(7) for _ in range(2))
    assert first == second == list(range(first[0], first[0] + 7))


def test_interleaved_engines_take_turns(tiny_models, monkeypatch):
    """Two engines of one round, and whose step was timed when."""
    turns = []
    advance = bench_run.Measurement.advance

    def noted(engine):
        work = advance(engine)
        turns.append((str(min(engine.candidate.prose)), work))
        return work

    monkeypatch.setattr(bench_run.Measurement, "advance", noted)
    options = ["--skip-tokenizer-init", "--enforce-eager", "--dtype", "float32", "--max-model-len", "128"]
    model = str(tiny_models("Llama"))
    served = Served.open(model)
    two = {name: Candidate(served, options, [int(name)] * 99) for name in ("1", "2")}
    found = rounds(two, BenchSettings(("prefill:16", "decode:1x16"), 1, 2, interleaved=True))
    assert turns == [(name, work) for work in (*["prefill:16"] * 2, *["decode:1x16"] * 32, None) for name in two]
    for (measured,) in found.values():
        assert {work: len(seconds) for work, seconds in measured.seconds.items()} == {
            "prefill:16": 2,
            "decode:1x16": 32,
        }
        assert measured.peak_bytes > 0


def test_refuses_what_vllm_refuses_in_one_line(tiny_models):
    candidate = Candidate(Served.open(str(tiny_models("Llama"))), ["--max-model-len", "9999", "--skip-tokenizer-init"])
    with pytest.raises(UsageError, match=r"max_model_len \(9999\) is greater than") as refusal:
        rounds({"a": candidate}, BenchSettings(("prefill:16",), 1, 1))
    assert "\n" not in str(refusal.value)
