"""What vLLM calls when it starts: registers the planned architectures (entry point `vllm.general_plugins`)."""

import logging

from model_executors.families import FAMILIES
from vllm_ext.versions import vllm_problem

logger = logging.getLogger("vllm.vllm_ext")


def register() -> None:
    """Register every family's planned class, by string; safe to call again, and in each of vLLM's processes."""
    if problem := vllm_problem():
        logger.error("vllm-ext registers nothing: %s", problem)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from model_executors.hooks.verify import AttentionPlanConfig

    for family in FAMILIES.values():
        ModelRegistry.register_model(family.planned_architecture, f"{family.module}:{family.planned_architecture}")
        MODELS_CONFIG_MAP[family.planned_architecture] = AttentionPlanConfig
