"""`vllm-ext bench`: what is measured beside what, and the shape that ideals are worked out from."""

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from model_executors.attention_plan import LayerPlan
from model_executors.heads.head_plan import CHARACTER_HEADS, HeadKind
from vllm_ext.bench import machine
from vllm_ext.bench.report import Row, report, rows, show
from vllm_ext.bench.run import BenchSettings, Candidate, rounds
from vllm_ext.bench.shapes import write_shape, write_shape_with_heads
from vllm_ext.bench.work import Work
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.costs import Shape
from vllm_ext.errors import UsageError
from vllm_ext.folders import check_file
from vllm_ext.offline.model import read_tokenizer
from vllm_ext.served import Served
from vllm_ext.tasks.texts import prose
from vllm_ext.versions import vllm_problem

BLOCK = 128
"""Tokens of a block of the KV cache on a CPU."""
SEQUENCES, MANY_SEQUENCES = 128, 1024
"""Requests that vLLM takes at once by itself, on a CPU and on a large GPU."""
DUMMY = ("--load-format", "dummy")
UNTOKENIZED = ("--skip-tokenizer-init",)  # prompts are token ids


@dataclass(frozen=True)
class Pair:
    """Stock and a variant of it, to be measured beside each other."""

    name: str
    described: str
    """The variant, by the options that name it."""
    stock: Served
    variant: Served
    vllm_args: tuple[str, ...] = ()
    """For both, before the user's own."""

    @classmethod
    def of(
        cls,
        model: str,
        changes: Mapping[int, LayerPlan] | None = None,
        planned: str | None = None,
        head: HeadKind | None = None,
        agreement: float | None = None,
        *,
        described: str = "",
        vllm_args: Sequence[str] = (),
    ) -> Self:
        """The stock `model`, beside a plan or a head laid over it, or beside a checkpoint that was planned.

        Raises:
            UsageError: for a model or plan that is missing, damaged or does not fit.

        """
        stock = Served.open(model, vllm_args=vllm_args)
        variant = Served.open(planned or model, changes, head, agreement, vllm_args=vllm_args)
        if planned is not None and variant.plan is None:
            raise UsageError(f"--planned {planned}: it has no attention plan; write one with vllm-ext plan")
        return cls(Path(model).name, described, stock, variant)

    @classmethod
    def of_shape(
        cls,
        shape: str,
        scratch: Path,
        changes: Mapping[int, LayerPlan] | None = None,
        head: HeadKind | None = None,
        *,
        described: str = "",
    ) -> Self:
        """A model of that shape, of random weights, and a variant; both are written into the folder `scratch`.

        Raises:
            UsageError: for an unknown shape, or a plan that does not fit it.

        """
        if head in CHARACTER_HEADS:
            if changes is not None:
                raise UsageError(f"--shape with --head {head}: measure a plan's layers by themselves; drop the layers")
            stock, spelled = (Served.open(str(folder)) for folder in write_shape_with_heads(shape, scratch))
            return cls(shape, described, stock, Served.open(spelled.model, None, head))
        stock = Served.open(str(write_shape(shape, scratch / "stock")), vllm_args=DUMMY)
        if changes is None:
            variant = Served.open(stock.model, None, head, vllm_args=DUMMY)
        else:
            planned = write_shape(shape, scratch / "planned", changes)
            variant = Served.open(str(planned), None, head, vllm_args=DUMMY)
        return cls(shape, described, stock, variant, DUMMY)

    @property
    def shape(self) -> Shape:
        """What ideals are worked out from; what its elements take is known when an engine has chosen."""
        from transformers import AutoConfig

        stock = self.stock.checkpoint
        return Shape.of(AutoConfig.from_pretrained(stock.folder or stock.name), stock.family)

    def candidates(self, settings: BenchSettings, args: Sequence[str]) -> dict[str, Candidate]:
        """Both as engines are to serve them, with vLLM's options `args`."""
        stock = self.stock.checkpoint
        args = [*args, *self.vllm_args, *UNTOKENIZED]
        if not any(each.startswith("--max-model-len") for each in args):
            args += ["--max-model-len", str(_max_model_len(stock, settings))]
        streams = max(Work.parse(text).streams for text in settings.work)
        if streams >= SEQUENCES and not any(each.startswith("--max-num-seqs") for each in args):
            args += ["--max-num-seqs", str(max(streams + 1, MANY_SEQUENCES))]
        # On random tokens all rows would be unsure.
        prose = _prose(stock) if 0 < self.variant.head.threshold < 1 else ()
        return {
            name: Candidate(served, args, prose) for name, served in (("stock", self.stock), ("variant", self.variant))
        }


def _prose(stock: Checkpoint) -> Sequence[int]:
    """Held-out prose, in the checkpoint's tokens."""
    ids = read_tokenizer(stock)(prose("held_out"), add_special_tokens=False, verbose=False).input_ids
    return list(itertools.chain.from_iterable(ids))


def _max_model_len(stock: Checkpoint, settings: BenchSettings) -> int:
    """Enough for all work, in whole blocks of the KV cache where the model takes so many."""
    largest, needed = "", 0
    for text in settings.work:
        if (tokens := Work.parse(text).longest(settings.repeats)) > needed:
            largest, needed = text, tokens
    taken = stock.config.get("max_position_embeddings") or needed + BLOCK
    if needed > taken:
        raise UsageError(
            f"--work {largest}: its requests grow to {needed} tokens, and the model takes {taken}; choose less"
        )
    return min(taken, -(-needed // BLOCK) * BLOCK)


def bench(pair: Pair, settings: BenchSettings, args: Sequence[str], json_file: Path | None) -> None:
    """Measure, print the table, and the JSON as the last line.

    Raises:
        UsageError: for work that the model cannot take, and where an engine does not start.

    """
    if json_file is not None:
        check_file("--json", json_file)
    if problem := vllm_problem():
        raise UsageError(problem)
    found, made = measure(pair, settings, args)
    show(made, found)
    text = json.dumps(made)
    if json_file is not None:
        json_file.write_text(text + "\n")
    print(text)


def measure(pair: Pair, settings: BenchSettings, args: Sequence[str]) -> tuple[list[Row], dict[str, Any]]:
    """The rows, and all of it for JSON; raises as `bench` does."""
    measured = rounds(pair.candidates(settings, args), settings)
    shape = replace(pair.shape, element_bytes=measured["stock"][0].element_bytes)
    roof = machine.measured(shape.element_bytes)
    heads = (pair.stock.head, pair.variant.head)
    found = rows(measured, shape, pair.variant.attention_plan, heads, roof, settings)
    told = {key: value for key, value in asdict(settings).items() if key != "work"} | {"vllm_args": list(args)}
    return found, report(pair.name, pair.described, found, measured, roof, told)
