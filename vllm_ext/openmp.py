"""Torch's OpenMP, preloaded as vLLM does for its CPU workers: one for torch and whatever else has threads."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch

VARIABLE = "LD_PRELOAD"


def preloading(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process that has it from its start."""
    found = map(str, (Path(torch.__file__).parent / "lib").glob("libgomp*"))
    return {**environment, VARIABLE: ":".join(filter(None, [environment.get(VARIABLE, ""), *found]))}


def preloaded() -> bool:
    """Whether this process has one, asked before vLLM sets the variable for its workers."""
    return "omp" in os.environ.get(VARIABLE, "")
