"""Shared models and engines. Tiny random models decide the logic; the real model proves the whole.

Engines run inside the test process and are kept for the session, since each start costs seconds.
"""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:  # a core for each of two
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.servers import Server

# Files that ask the same server, which one worker starts.
TOGETHER = dict.fromkeys(("test_endpoints", "test_load_served", "test_serve"), "served")
# The longest first, so that two workers end together; what listens to the clock is not beside the type checker.
FIRST = (
    "test_engine_modes",
    "test_faults",
    "served",
    "test_model_runner_v2",
    "test_dashboards",
    "test_fallback_head",
    "test_bench",
    "test_quality",
    "test_conversion",
    "test_families",
)
# Engines over vLLM's Transformers backend, which changes transformers' classes for the whole process.
LAST = ("test_transformers_decoder",)
for _name in {*TOGETHER, *FIRST, *LAST} - {*TOGETHER.values()}:
    assert Path(__file__).with_name(f"{_name}.py").exists(), f"{_name} is no test file any more"


def group(nodeid: str) -> str:
    """What one worker runs in one go: a file, or several."""
    file = Path(nodeid.partition("::")[0]).stem
    return TOGETHER.get(file, file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the groups."""
    places = {name: place for place, name in enumerate((*FIRST, "", *LAST))}
    items.sort(key=lambda item: places.get(group(item.nodeid), places[""]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Hand out groups: xdist's own `--dist loadgroup` gives no test its group with pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group(nodeid)

    return GroupScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def kept_engine_is_ended() -> Iterator[None]:
    """Where there is one: tests that need none do not import vLLM."""
    yield
    if "tests.engines" in sys.modules:
        sys.modules["tests.engines"].end_kept()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory):
    """The folder of a family's tiny random model, made at its first use."""
    from tests.tiny import write_tiny

    root = tmp_path_factory.mktemp("tiny")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            write_tiny(family, root / family)
        return root / family

    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The embedded model's checkpoint."""
    from vllm_ext.embedded.model import fetch

    return fetch()


@pytest.fixture(scope="session")
def served_smollm2(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> "Iterator[Server]":
    """A server of the embedded model, its top three layers without attention: for whoever harms no other's tests."""
    from tests.servers import served
    from vllm_ext.dtypes import fast_dtype

    options = ["--skip", "27-29", "--served-model-name", "SmolLM2", "--dtype", fast_dtype()]
    options += ["--max-model-len", 1024, "--max-num-batched-tokens", 256]
    options += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--log-format", "json"]
    with served(smollm2, *options, log=tmp_path_factory.mktemp("log") / "server.log") as server:
        yield server
