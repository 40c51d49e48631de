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

from pathlib import Path

import pytest

# The longest, so that two workers end together.
FIRST = {"test_engine_modes", "test_quality", "test_serve", "test_targets"}
# Engines over vLLM's Transformers backend, which changes transformers' classes for the whole process.
LAST = {"test_transformers_decoder"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files."""
    items.sort(key=lambda item: (item.path.stem in LAST) - (item.path.stem in FIRST))


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
