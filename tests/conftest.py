"""Shared models and engines. Tiny random models decide the logic; the real model proves the whole.

Engines run inside the test process and are kept for the session, since each start costs seconds.
"""

import os

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest


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
    from vllm_ext.embedded import fetch

    return fetch()
