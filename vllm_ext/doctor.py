"""`vllm-ext doctor`: what is installed, what this machine runs fast, what is supported, and what to mend; a line each.

vLLM itself is not imported, which takes half a minute on a busy machine: its version, the entry points that it will
find and the packages that keep it from importing are looked at instead.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, entry_points, version

from rich.console import Console
from rich.table import Table

from model_executors.attention_plan import KINDS
from model_executors.evidence import SEEN
from model_executors.families import FAMILIES
from vllm_ext.versions import PLUGIN, vllm_distribution, vllm_problem

GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins", "vllm.endpoint_plugins")
BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
"""vLLM imports these where they are installed, and does not start where they were built for another torch."""


@dataclass(frozen=True)
class Finding:
    """One line of the report; `cure` only where something is wrong."""

    subject: str
    state: str
    cure: str | None = None


def examine() -> bool:
    """Print the report; returns whether all is well."""
    console = Console(highlight=False)
    table = Table(show_header=False, box=None)
    findings = list(_findings())
    for finding in findings:
        table.add_row("[red]no[/]" if finding.cure else "[green]ok[/]", finding.subject, finding.state)
    console.print(table)
    for finding in findings:
        if finding.cure:
            console.print(f"{finding.subject}: {finding.cure}", style="red", markup=False, soft_wrap=True)
    return not any(finding.cure for finding in findings)


def _findings() -> Iterator[Finding]:
    yield Finding("vllm-ext", f"{version('vllm-ext')}, Python {platform.python_version()}")
    name, found = vllm_distribution() or ("vllm", "not installed")
    yield Finding(name, found, vllm_problem())
    yield _plugin()
    try:
        import torch
    except Exception as error:  # whatever keeps it from importing is the finding
        yield Finding("torch", type(error).__name__, f"{error}; install vllm-ext[cpu] or vllm-ext[cuda] again")
        return
    yield _torch(torch.__version__)
    yield from _gpus() if torch.cuda.is_available() else [_cpu()]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = ", ".join(kind for kind in KINDS if kind in SEEN[device])
    yield Finding("families", f"{len(FAMILIES)}, rows of model_executors/families.py")
    yield Finding("layers", f"{kinds}: seen to answer right on {device}")


def _plugin() -> Finding:
    """Whether vLLM will find and load our entry points."""
    missing = [group for group in GROUPS if PLUGIN not in entry_points(group=group).names]
    if missing:
        return Finding("plugin", f"no {', '.join(missing)}", "install vllm-ext again: pip install -e .")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        return Finding("VLLM_PLUGINS", repr(allowed), f"add {PLUGIN} to it or unset it")
    return Finding("plugin", f"{PLUGIN}, which vLLM finds in {len(GROUPS)} groups")


def _torch(found: str) -> Finding:
    for package in BESIDE_TORCH:
        try:
            version(package)
            import_module(package)
        except PackageNotFoundError:
            continue
        except Exception as error:
            cure = f"{package} does not import beside it ({error}), nor does vLLM; remove it, or install the one for it"
            return Finding("torch", found, cure)
    return Finding("torch", found)


def _cpu() -> Finding:
    """What the CPU computes fast, and the type that follows."""
    import torch

    from vllm_ext.dtypes import slow_on_cpu

    extensions = torch.backends.cpu.get_cpu_capability()
    threads = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores"
    if slow_on_cpu(torch.bfloat16):
        return Finding("CPU", f"{extensions}, {threads}; bfloat16 is slow: serve with --dtype float32")
    return Finding("CPU", f"{extensions}, {threads}; bfloat16 is fast, keep the checkpoint's")


def _gpus() -> Iterator[Finding]:
    """Each GPU with its driver, and the attention that vLLM takes there by itself."""
    import torch

    driver = "driver unknown"
    if tool := shutil.which("nvidia-smi"):
        command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        driver = f"driver {done.stdout.split()[0]}" if done.returncode == 0 and done.stdout.split() else driver
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        attention = {9: "FlashAttention 3", 8: "FlashAttention 2"}.get(properties.major, "chosen by vLLM")
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        state = f"{properties.name}, {memory}, {driver}, CUDA {torch.version.cuda}; attention: {attention}"
        yield Finding(f"GPU {number}", state)
