"""The decoder families that can be planned, a row each.

A row says how a layer of vLLM's class is laid out: what goes with the attention when it is skipped, and what remains.
The layer must be of the pre-norm residual kind, `forward(positions, hidden_states, residual)`.
"""

from dataclasses import dataclass

from model_executors.attention_plan import ARCHITECTURE_PREFIX


@dataclass(frozen=True)
class Family:
    """One of vLLM's decoder classes, by the names its layers give their modules."""

    architecture: str
    """The name in `config.json` and in vLLM's registry."""
    attention: tuple[str, ...] = ("input_layernorm", "self_attn")
    """The modules that a skipped layer does without."""
    mlp_norm: str = "post_attention_layernorm"
    mlp: str = "mlp"
    mlp_post_norm: str | None = None

    @property
    def planned_architecture(self) -> str:
        """The name of our own under which the planned class is registered."""
        return ARCHITECTURE_PREFIX + self.architecture

    def drops(self, tensor_name: str, skipped: set[int]) -> bool:
        """Whether the checkpoint's tensor belongs to an attention that is skipped.

        `tensor_name` is a Hugging Face name, as `model.layers.3.self_attn.q_proj.weight`.
        """
        parts = tensor_name.split(".")
        if "layers" not in parts[:-2]:
            return False
        at = parts.index("layers")
        return parts[at + 1].isdigit() and int(parts[at + 1]) in skipped and parts[at + 2] in self.attention


def _gemma(architecture: str) -> Family:
    return Family(
        architecture,
        attention=("input_layernorm", "self_attn", "post_attention_layernorm"),
        mlp_norm="pre_feedforward_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    )


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),  # Llama 2 and 3, SmolLM2, Yi, Llemma
        Family("MistralForCausalLM"),
        Family("Qwen2ForCausalLM"),
        Family("Qwen3ForCausalLM"),
        _gemma("Gemma2ForCausalLM"),
        _gemma("Gemma3ForCausalLM"),
        Family("Phi3ForCausalLM"),
    )
}


def family_of(architecture: str) -> Family:
    """The row of an architecture, by its stock or its planned name.

    Raises:
        ValueError: for an architecture without a row.

    """
    family = FAMILIES.get(architecture.removeprefix(ARCHITECTURE_PREFIX))
    if family is None:
        raise ValueError(f"architecture {architecture} has no attention plan; use one of {', '.join(FAMILIES)}")
    return family
