"""`/v1/plan`, `/v1/models` with the plan, and `/ready`: vLLM adds them through its group `vllm.endpoint_plugins`.

vLLM loads such a plugin only where `VLLM_PLUGINS` names it, which `vllm-ext serve` sees to.
"""

import logging
from argparse import Namespace
from http import HTTPStatus
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field
from starlette.datastructures import State
from starlette.responses import JSONResponse, Response
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.serve.engine.protocol import ErrorResponse, ModelCard, ModelList

from serving.drain import drain
from serving.errors import error_response
from serving.plan import PlanReport
from serving.settings import ARGUMENT

logger = logging.getLogger("vllm.vllm_ext")
router = APIRouter(tags=["vllm-ext"])


class PlanName(BaseModel):
    """The plan in a few words; `/v1/plan` has all of it."""

    plan: str = Field(description="'stock', or as 'skip 27-29'.")
    kinds: dict[str, int] = Field(description="How many layers are of each kind.")
    head: str


class PlannedModelCard(ModelCard):
    """vLLM's card, and the plan."""

    vllm_ext: PlanName | None = Field(default=None, description="Null for a model that no plan is for.")


class PlannedModelList(ModelList):
    """vLLM's list, and the plan on each card."""

    data: list[PlannedModelCard] = Field(default_factory=list)  # type: ignore[assignment]


class Ready(BaseModel):
    """That requests are taken."""

    status: str = "ready"


@router.get(
    "/v1/plan", response_model=PlanReport, responses={404: {"model": ErrorResponse, "description": "No plan is for it"}}
)
async def show_plan(request: Request) -> Any:
    """The attention plan that is served: each layer's kind, what it saves, and where fitted tensors come from."""
    report = request.app.state.plan_report
    if report is None:
        architecture = request.app.state.vllm_config.model_config.architecture
        return error_response(HTTPStatus.NOT_FOUND, f"no attention plan is for {architecture}")
    return report


@router.get("/v1/models", response_model=PlannedModelList)
async def show_available_models(request: Request) -> Response:
    """The models that are served, each with its plan."""
    models = (await request.app.state.openai_serving_models.show_available_models()).model_dump()
    report = request.app.state.plan_report
    name = report and PlanName(plan=report.name, kinds=report.kinds, head=report.head.kind).model_dump()
    for card in models["data"]:
        card["vllm_ext"] = name
    return JSONResponse(models)


@router.get(
    "/ready", response_model=Ready, responses={503: {"model": ErrorResponse, "description": "No requests are taken"}}
)
async def ready(request: Request) -> Any:
    """Whether requests are taken: not while the server stops, nor without its engine. /health says if it lives."""
    client = request.app.state.engine_client
    if drain.draining:
        return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "this server is stopping")
    if client is not None and client.errored:
        return error_response(HTTPStatus.SERVICE_UNAVAILABLE, "the engine is dead")
    return Ready()


class EndpointPlugin:
    """What vLLM makes and calls."""

    name = "vllm_ext"
    required_tasks = None

    def attach_router(self, app: FastAPI) -> None:
        """Add our routes, and take /metrics away where it has a port of its own."""
        settings = getattr(app.state.args, ARGUMENT, None)
        if settings is not None and settings.metrics_port is not None:
            app.router.routes[:] = [each for each in app.router.routes if getattr(each, "path", None) != "/metrics"]
        app.include_router(router)

    async def init_state(self, engine_client: EngineClient | None, state: State, args: Namespace) -> None:
        """Work the report out once; without an engine there is no plan."""
        state.plan_report = None if engine_client is None else PlanReport.of(engine_client.vllm_config)
        if state.plan_report is not None and state.plan_report.name != "stock":
            logger.log(logging.INFO if state.plan_report.judged else logging.WARNING, state.plan_report.judged_line)
