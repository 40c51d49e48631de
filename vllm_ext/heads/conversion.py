"""`vllm-ext heads train`: a checkpoint converted by self-distillation, from its text to its card."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file

from model_executors.attention_plan import CONFIG_KEY, AttentionPlan
from model_executors.heads.character_head import rescore, slots_of
from model_executors.heads.head_plan import CHARACTER_HEADS, HeadKind, HeadPlan, HeadShape
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError
from vllm_ext.folders import check_out
from vllm_ext.heads import calibration, training
from vllm_ext.heads.report import write as write_report
from vllm_ext.heads.states import States, StudentLayers, collect
from vllm_ext.heads.student import Student, begin, new_head
from vllm_ext.heads.training import begun
from vllm_ext.heads.vocabulary import POSITIONS, CharacterVocabulary
from vllm_ext.heads.writing import write
from vllm_ext.offline.model import OfflineModel, read_tokenizer
from vllm_ext.planned_checkpoint import FITTED, Fit, Trained, write_planned
from vllm_ext.progress import progress
from vllm_ext.tasks import texts
from vllm_ext.tasks.passages import cut, read_texts
from vllm_ext.versions import offline_versions

PASSAGES = "passages.safetensors"
TEXT = "text.json"
SERVED_WITH: HeadKind = "rescored"
"""What a converted checkpoint is served with, unless another head is asked for."""
HELD_OUT_PART = 10
"""One text in so many of the user's is held out."""


@dataclass(frozen=True)
class ConversionSettings:
    """What is converted, and on what."""

    head: Literal["character", "stock"] = "character"
    positions: int = POSITIONS
    width: int = 1_536
    """Of the gated block before the heads."""
    layers: int = 0
    """How many of the top layers' MLPs are trained with the head."""
    lora: int = 0
    """The rank of adapters that are trained there in place of the weights; 0 is none."""
    text: Path | None = None
    tokens: int = 262_144
    """Of the text."""
    written: int = 0
    """Tokens that the model writes itself."""
    length: int = 512
    """Tokens of a passage."""
    held_out: int = 32_768
    """Tokens to choose thresholds on, and to report; half of them written, where any are."""


def convert(
    source: Checkpoint,
    planned: Checkpoint | None,
    settings: ConversionSettings,
    trained: training.TrainingSettings,
    out: Path,
    command: Sequence[str],
) -> Path | None:
    """Train, judge and write `out`; what an interrupted run goes on from lies in `out` with `-training` added.

    `planned` is a planned checkpoint of `source`, whose plan the student has. Returns the report's file; of several
    processes only the first does.

    Raises:
        UsageError: for what a user can mend.

    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    work = out.with_name(f"{out.name}-training")
    with processes.main_process_first():  # the others find what it made
        check_out(out)
        work.mkdir(parents=True, exist_ok=True)
        apart = ("head", "positions", "width", "lora")  # of these, text and states know nothing
        texts_and_states = {name: value for name, value in asdict(settings).items() if name not in apart}
        begun(work / "settings.json", texts_and_states | {"seed": trained.seed, "planned": planned and planned.name})
        tokenizer = read_tokenizer(source)
        passages, held_out = _passages(source, tokenizer, settings, trained.seed, work)
        model = OfflineModel(source)
        plan = AttentionPlan.of(source.num_layers) if planned is None or planned.plan is None else planned.plan
        fitted = _fitted(planned)
        part = StudentLayers(settings.layers, dict(enumerate(plan.layers)), fitted)
        states = collect(model, passages, work / "states", part)
        kept = collect(model, held_out, work / "held-out", part)
    head = None
    torch.manual_seed(trained.seed)
    if settings.head == "character":
        vocabulary = CharacterVocabulary.of(tokenizer, source.config["vocab_size"], settings.positions)
        spellings, slots = slots_of(vocabulary.spellings, settings.positions)
        shape = HeadShape(source.config["hidden_size"], source.config["vocab_size"], slots, settings.width)
        head = new_head(shape, spellings, model.device)
        begin(head, model.model.get_output_embeddings().weight)
    student = Student(model, part, head, settings.lora)
    training.train(student, states, passages, trained, work)
    if not processes.is_main_process:
        return None
    student.merge()
    student.to_dtype(model.dtype)
    judged = judge(student, kept, held_out)
    provenance = {
        "settings": {**asdict(settings), "text": settings.text and settings.text.name},
        "training": asdict(trained),
        "text": json.loads((work / TEXT).read_text()),
        "tokens": passages.numel(),
        **calibration.calibrated(judged),
        "versions": {**offline_versions(), "accelerate": version("accelerate")},
    }
    plan_of_head = (
        HeadPlan(SERVED_WITH, slots=head.shape.slots, width=head.shape.width) if head is not None else HeadPlan()
    )
    made = Trained(plan_of_head, student.head_tensors(), student.layer_tensors(), provenance)
    fit = None if not plan.fitted else Fit(fitted, planned.config[CONFIG_KEY]["fit"])  # type: ignore[union-attr]
    write_planned(source, plan, out, fit, made)
    return write_report(provenance, source.called, work / training.CURVE, out / "training", command)


@torch.no_grad()
def judge(student: Student, states: States, passages: torch.Tensor) -> dict[HeadKind, calibration.Comparison]:
    """How the student does on passages `[passages, length]`, a passage at a time: by the kind of its head, and where it
    has character heads, also with the exact scores of the best they spell.
    """
    parts: dict[HeadKind, list[calibration.Comparison]] = {
        kind: [] for kind in (CHARACTER_HEADS if student.head else ("stock",))
    }
    with progress() as bars:
        for number in bars.track(range(len(passages)), description="judging"):
            entered = None if student.pointwise else student.model.enter(passages[number : number + 1])
            teacher = torch.cat(list(student.model.logits(states.leaving[number]))).log_softmax(-1)
            entering = states.entering[number : number + 1]
            scores = student(entering.flatten(0, 1) if student.pointwise else entering, entered)
            for kind, judged in parts.items():
                confidence = None
                if kind == "rescored":
                    confidence = rescore(scores, HeadPlan.shortlist, partial(teacher.gather, 1))
                judged.append(calibration.Comparison.of(scores, teacher, confidence))
    return {kind: calibration.Comparison.join(judged) for kind, judged in parts.items()}


def _fitted(planned: Checkpoint | None) -> dict[str, torch.Tensor]:
    """The planned checkpoint's tensors."""
    if planned is None or planned.folder is None or not (planned.folder / FITTED).is_file():
        return {}
    return load_file(planned.folder / FITTED)


def _passages(
    source: Checkpoint, tokenizer: Any, settings: ConversionSettings, seed: int, work: Path
) -> tuple[torch.Tensor, torch.Tensor]:
    """To train on, and held out: `[passages, length]` each; what was made of an interrupted run is taken as it is."""
    if (work / PASSAGES).is_file():
        made = load_file(work / PASSAGES)
        return made["passages"], made["held_out"]
    articles = {"train": texts.prose("calibration"), "held_out": texts.prose("held_out")}
    if settings.text is not None:
        given = read_texts(settings.text)
        articles = {"train": given[len(given) // HELD_OUT_PART :], "held_out": given[: len(given) // HELD_OUT_PART]}
        if not articles["held_out"]:
            raise UsageError(f"--text {settings.text}: it has {len(given)} texts; give {HELD_OUT_PART} or more")
    # Half of what is held out is written too, where any is.
    held_out = settings.held_out // (2 if settings.written else 1)
    cutting: dict[str, Any] = {"length": settings.length, "seed": seed}
    parts = {
        "passages": [cut(tokenizer, articles["train"], tokens=settings.tokens, **cutting)],
        "held_out": [cut(tokenizer, articles["held_out"], tokens=held_out, **cutting)],
    }
    if settings.written:
        assert source.folder is not None
        numbers = [max(1, tokens // settings.length) for tokens in (settings.written, held_out)]
        written = write(str(source.folder), tokenizer, sum(numbers), settings.length, seed)
        for name, part in zip(parts, written.split(numbers), strict=True):
            parts[name].append(part)
    made = {name: torch.cat(part) for name, part in parts.items()}
    name = texts.prose_source() if settings.text is None else settings.text.name
    digest = hashlib.sha256(made["passages"].numpy().tobytes()).hexdigest()
    (work / TEXT).write_text(json.dumps({"name": name, "passages_sha256": digest}))
    save_file(made, work / PASSAGES)
    return made["passages"], made["held_out"]
