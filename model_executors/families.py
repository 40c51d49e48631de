"""The decoder families that can be planned, a row each.

A row says where, in a layer of vLLM's class, the attention is; all else in the layer stays as that class has it. So the
layer may have whatever norms, multipliers, parallel blocks and experts: it must only call its attention as a module,
`attention(positions=..., hidden_states=...)`, and take one tensor from it.
"""

from dataclasses import dataclass
from typing import Any

from model_executors.attention_plan import ARCHITECTURE_PREFIX, KINDS, Kind
from model_executors.names import DECODER, TRANSFORMERS_DECODER


@dataclass(frozen=True)
class Family:
    """One of vLLM's decoder classes, by the names its layers give their modules."""

    architecture: str
    """The name in `config.json` and in vLLM's registry."""
    attention: str = "self_attn"
    """What a layer calls its attention."""
    input_norm: str | None = "input_layernorm"
    """The norm that makes the attention's input; None where the attention reads the stream itself."""
    out_proj: str = "o_proj"
    """What the attention calls the projection of its output."""
    norm: str = "norm"
    """What the decoder calls its final norm."""
    residual: bool = True
    """Whether a layer is `forward(positions, hidden_states, residual)`; else `forward(positions, hidden_states)`."""
    split: bool = True
    """Whether the stream between layers is the sum of the `hidden_states` and the `residual` that a layer returns; else
    `hidden_states` is all of it, and whatever is returned or given to the final norm beside it is stale."""
    reduced: bool = True
    """Whether the attention's output is complete on every tensor-parallel rank; else the layer adds up the ranks'."""
    kinds: tuple[Kind, ...] = KINDS
    """What its layers can be: a frozen layer's attention must do nothing between its kernel and `out_proj`, and a
    window's must give the kernel heads of one size."""
    module: str = DECODER
    """Where the planned class is made."""

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
        return parts[at + 1].isdigit() and int(parts[at + 1]) in skipped and parts[at + 2] == self.attention


def own_window(hf_config: Any, layer: int) -> int | None:
    """The sliding window that the model itself gives the layer."""
    kinds = getattr(hf_config, "layer_types", None)
    sliding: int | None = getattr(hf_config, "sliding_window", None)
    return sliding if kinds is None or kinds[layer] == "sliding_attention" else None


def _transformers(architecture: str, **names: Any) -> Family:
    """A family that vLLM runs through its Transformers backend: the names are those of transformers' classes."""
    return Family(
        architecture,
        residual=False,
        kinds=("full", "window", "skip"),  # positions reach these attentions as rotations
        module=TRANSFORMERS_DECODER,
        **names,
    )


FAMILIES: dict[str, Family] = {
    family.architecture: family
    for family in (
        Family("LlamaForCausalLM"),  # Llama 2 and 3, SmolLM2, Yi, Llemma
        Family("MistralForCausalLM"),
        Family("Qwen2ForCausalLM"),
        Family("Qwen3ForCausalLM"),
        Family("Gemma2ForCausalLM"),
        Family("Gemma3ForCausalLM"),
        Family("Phi3ForCausalLM"),
        # Classes of their own with Llama's layout.
        Family("ApertusForCausalLM", input_norm="attention_layernorm"),
        Family("Ernie4_5ForCausalLM"),
        Family("GemmaForCausalLM"),
        Family("Glm4ForCausalLM"),
        Family("Ministral3ForCausalLM"),
        Family("NemotronForCausalLM"),
        # The very class of Llama, by another name.
        Family("InternLM3ForCausalLM"),
        Family("IQuestCoderForCausalLM"),
        Family("TeleChat3ForCausalLM"),
        # The sum is formed within the layer.
        Family("CohereForCausalLM", split=False, reduced=False),  # attention beside the MLP
        Family("Cohere2ForCausalLM", split=False, reduced=False),
        Family("Exaone4ForCausalLM", split=False, input_norm=None),  # norms after attention and MLP, as OLMo 2
        Family("GraniteForCausalLM", residual=False),
        Family("HyperCLOVAXForCausalLM", split=False),
        Family("StableLmForCausalLM", residual=False),
        # Mixtures of experts.
        Family("Cohere2MoeForCausalLM", split=False),
        Family("Ernie4_5_MoeForCausalLM"),
        Family("ExaoneMoeForCausalLM"),
        Family("Glm4MoeForCausalLM"),
        Family("GraniteMoeForCausalLM", residual=False),
        Family("GraniteMoeSharedForCausalLM", residual=False),
        Family("Llama4ForCausalLM", kinds=("full", "skip")),  # attention in chunks
        Family("MixtralForCausalLM"),
        Family("OlmoeForCausalLM"),
        Family("PhiMoEForCausalLM", split=False),
        Family("Qwen2MoeForCausalLM"),
        Family("Qwen3MoeForCausalLM"),
        # Through vLLM's Transformers backend.
        _transformers("ArceeForCausalLM"),
        _transformers("CwmForCausalLM"),
        _transformers("GlmForCausalLM"),
        _transformers("HunYuanDenseV1ForCausalLM"),
        _transformers("HunYuanMoEV1ForCausalLM"),
        _transformers("Jais2ForCausalLM"),
        _transformers("OlmoForCausalLM"),
        _transformers("Olmo2ForCausalLM", input_norm=None),  # norms after attention and MLP
        _transformers("Olmo3ForCausalLM", input_norm=None),
        _transformers("PhiForCausalLM", out_proj="dense", norm="final_layernorm"),
        _transformers("SeedOssForCausalLM"),
        _transformers("SmolLM3ForCausalLM"),
        _transformers("Starcoder2ForCausalLM"),
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
