"""What is served: a checkpoint, the plan of its layers, and its head.

Both may be the checkpoint's own, or laid over it. The server, `bench`, `quality` and whatever else starts an engine
take one of these, and hand `hf_overrides()` to vLLM.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

from model_executors.attention_plan import CONFIG_KEY, AttentionPlan, LayerPlan
from model_executors.heads.head_plan import CHARACTER_HEADS, HeadKind, HeadPlan
from vllm_ext.checkpoint import Checkpoint
from vllm_ext.errors import UsageError


@dataclass(frozen=True)
class Served:
    """A model as an engine is to serve it.

    Raises:
        UsageError: for a plan laid over the checkpoint that needs fitted tensors.

    """

    checkpoint: Checkpoint
    plan: AttentionPlan | None
    """None of a stock checkpoint, of whatever family, that is served as it is."""
    head: HeadPlan

    def __post_init__(self) -> None:
        self.hf_overrides()

    @classmethod
    def open(
        cls,
        model: str,
        changes: Mapping[int, LayerPlan] | None = None,
        head: HeadKind | None = None,
        agreement: float | None = None,
        *,
        weights: bool = True,
        vllm_args: Sequence[str] = (),
    ) -> Self:
        """Find the model and check it, the plan that `changes` lay over it, and the head chosen for it.

        Without `changes` and `head` it is the checkpoint as it is. With `weights`, those in the folder are checked too,
        where `vllm_args` name no other format of them.

        Raises:
            UsageError: for a missing or damaged checkpoint, or a plan or head that does not fit.

        """
        checkpoint = Checkpoint.open(model, weights=False)
        plan = checkpoint.plan if changes is None else checkpoint.planned(changes)
        other = any(argument.startswith("--load-format") for argument in vllm_args)
        if weights and checkpoint.folder is not None and not other:
            checkpoint.check_weights()
        chosen = _head(checkpoint, head, agreement)
        if plan is None and chosen != checkpoint.head:
            plan = checkpoint.planned({})  # heads are of planned models
        return cls(checkpoint, plan, chosen)

    @property
    def model(self) -> str:
        """The checkpoint's folder or name, as the user gave it."""
        return self.checkpoint.name

    @property
    def attention_plan(self) -> AttentionPlan:
        """The plan, which of a stock checkpoint is all in full."""
        return self.plan or AttentionPlan.of(self.checkpoint.num_layers)

    def hf_overrides(self) -> dict[str, Any]:
        """What vLLM is to override in the checkpoint's configuration; nothing where it is served as it is."""
        overrides: dict[str, Any] = {}
        if self.plan is not None and self.plan != self.checkpoint.plan:
            overrides = self.checkpoint.overrides(self.plan)
        if self.head != self.checkpoint.head:
            section = self.checkpoint.config.get(CONFIG_KEY, {}) | overrides.get(CONFIG_KEY, {})
            overrides[CONFIG_KEY] = section | {"head": self.head.to_config()}
        return overrides


def _head(checkpoint: Checkpoint, head: HeadKind | None, agreement: float | None) -> HeadPlan:
    """The checkpoint's head, or another one in its place, with the threshold for `agreement`.

    Raises:
        UsageError: for character heads where there are none, or an agreement that was not calibrated for.

    """
    written = checkpoint.head
    if head is not None and head != written.kind:
        if head in CHARACTER_HEADS and not written.slots:
            raise UsageError(
                f"--head {head}: {checkpoint.name} has no character heads; train them with vllm-ext heads train"
            )
        written = replace(written, kind=head) if head in CHARACTER_HEADS else HeadPlan(head)
    if agreement is None:
        return written
    if not written.is_character:
        raise UsageError(f"--agreement {agreement:g}: it is for character heads; add --head character, or drop it")
    known: dict[float, float] = {}
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # whatever is written there
        for row in checkpoint.config[CONFIG_KEY]["training"]["calibration"]:
            if row.get("head", "character") == written.kind and 0 <= row["threshold"] <= 1:
                known[float(row["agreement"])] = float(row["threshold"])
    if not known:
        raise UsageError(
            f"--agreement {agreement:g}: {checkpoint.name} was not calibrated for --head {written.kind}; "
            "run vllm-ext heads calibrate, or drop it"
        )
    if agreement not in known:
        choices = ", ".join(f"{each:g}" for each in sorted(known))
        raise UsageError(f"--agreement {agreement:g}: {checkpoint.name} was calibrated for {choices}; take one of them")
    return replace(written, threshold=known[agreement])
