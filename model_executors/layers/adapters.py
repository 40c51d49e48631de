"""LoRA adapters below the layers that do not run for every position.

vLLM's LoRA kernels take one row for each token of a step. The tail and frozen layers see fewer rows, so adapters are
left off there, and an adapter that has weights for them is refused when it is loaded.
"""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn
from vllm.config import LoRAConfig
from vllm.lora.utils import get_supported_lora_modules, is_in_target_modules, is_supported_lora_module
from vllm.model_executor.models.utils import WeightsMapper

LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass
class LowerLayersMapper(WeightsMapper):
    """A model's own mapper of names, through which vLLM reads an adapter's."""

    end: int = 0
    """The first layer that adapters must leave alone."""

    def map_name(self, key: str) -> str | None:
        """Map as ever; raises ValueError for an adapter's weight elsewhere than in the lower layers."""
        layer = LAYER.search(key)
        if ".lora_" in key and (layer is None or int(layer[1]) >= self.end):
            raise ValueError(
                f"the adapter changes {key.partition('.lora_')[0]}, but with this attention plan only layers "
                f"0-{self.end - 1} can have adapters; merge it into the checkpoint and plan that"
            )
        return super().map_name(key)


def restrict_adapters(model: Any, lora_config: LoRAConfig, end: int) -> None:
    """Let vLLM put adapters on the layers below `end` only, and refuse those that want more."""
    supported = get_supported_lora_modules(model)
    packed = getattr(model, "packed_modules_mapping", None)

    def lower(name: str, module: nn.Module) -> bool:
        layer = LAYER.search(f".{name}.")
        return (
            layer is not None
            and int(layer[1]) < end
            and is_supported_lora_module(name, module, supported)
            and is_in_target_modules(name, lora_config.target_modules, packed)
        )

    lora_config.target_modules = [name for name, module in model.named_modules() if lower(name, module)]
    stock = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    model.hf_to_vllm_mapper = LowerLayersMapper(**vars(stock), end=end)
