"""vllm-ext behind Ray Serve LLM: an OpenAI-compatible application with replicas on as many machines as Ray has.

    cd deploy/ray_serve && serve deploy serve.yaml       # on a running Ray cluster
    cd deploy/ray_serve && serve run serve.yaml          # on this machine alone, in the foreground

Ray starts vLLM's engine in its own actors and does not go through `vllm-ext serve`; the plan comes with the checkpoint,
and the plugin with the installed package. So the model is a planned checkpoint, or a stock one for a baseline.
"""

from typing import Any

from pydantic import BaseModel, Field
from ray.serve import Application
from ray.serve.llm import LLMConfig, ModelLoadingConfig, build_openai_app


class Arguments(BaseModel, extra="forbid"):
    """What `args:` in serve.yaml may hold."""

    model: str = Field(description="A checkpoint's folder, the same on every machine, or a hub name.")
    name: str = Field(description="What clients call it.")
    replicas: int = Field(1, ge=1)
    max_replicas: int | None = Field(None, description="Scale up to so many on queue length; fixed without it.")
    accelerator: str | None = Field(None, description="Ray's name of the GPU, as H100; a CPU without it.")
    cpus: float = Field(1, gt=0, description="CPUs that Ray keeps for one engine, where there is no accelerator.")
    engine: dict[str, Any] = Field(default_factory=dict, description="vLLM's engine arguments, in snake_case.")
    environment: dict[str, str] = Field(default_factory=dict, description="Variables for the engines' processes.")


def build(arguments: Arguments) -> Application:
    """The application for `import_path: app:build`."""
    if arguments.max_replicas is None:
        scaling: dict[str, Any] = {"num_replicas": arguments.replicas}
    else:
        limits = {"min_replicas": arguments.replicas, "max_replicas": arguments.max_replicas}
        scaling = {"autoscaling_config": limits}
    on_cpu = {"bundle_per_worker": {"CPU": arguments.cpus}}
    config = LLMConfig(
        model_loading_config=ModelLoadingConfig(model_id=arguments.name, model_source=arguments.model),
        accelerator_type=arguments.accelerator,
        placement_group_config=None if arguments.accelerator else on_cpu,
        deployment_config=scaling,
        engine_kwargs=arguments.engine,
        runtime_env={"env_vars": arguments.environment},
        log_engine_metrics=True,
    )
    return build_openai_app({"llm_configs": [config]})
