"""`vllm-ext doctor`: what is installed, whether vLLM sees the plugin, what is supported here, and what to mend."""

import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points, version

from rich.console import Console
from rich.table import Table

from model_executors.attention_plan import KINDS
from model_executors.families import FAMILIES
from vllm_ext.versions import PLUGIN, vllm_distribution, vllm_problem

GROUPS = ("vllm.general_plugins", "vllm.stat_logger_plugins")


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
    with console.status("asking vLLM, which takes a moment to import"):
        findings = list(_findings())
    for finding in findings:
        table.add_row("[red]✗[/]" if finding.cure else "[green]✓[/]", finding.subject, finding.state)
    console.print(table)
    for finding in findings:
        if finding.cure:
            console.print(f"{finding.subject}: {finding.cure}", style="red", markup=False, soft_wrap=True)
    return not any(finding.cure for finding in findings)


def _findings() -> Iterator[Finding]:
    yield Finding("vllm-ext", f"{version('vllm-ext')}, Python {platform.python_version()}")
    name, found = vllm_distribution() or ("vllm", "not installed")
    problem = vllm_problem()
    yield Finding(name, found, problem)
    for group in GROUPS:
        seen = any(point.name == PLUGIN for point in entry_points(group=group))
        yield Finding(
            group, PLUGIN if seen else "missing", None if seen else "install vllm-ext again: pip install -e ."
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        cure = None if PLUGIN in allowed.split(",") else f"add {PLUGIN} to it or unset it"
        yield Finding("VLLM_PLUGINS", repr(allowed), cure)
    if problem is None:
        yield from _in_vllm()
    yield Finding("kinds", ", ".join(KINDS))


def _in_vllm() -> Iterator[Finding]:
    """What vLLM itself says once it has loaded its plugins."""
    import torch

    yield Finding("torch", f"{torch.__version__}, {torch.cuda.device_count() or 'no'} CUDA devices")
    try:
        from vllm import ModelRegistry
        from vllm.platforms import current_platform
        from vllm.plugins import load_general_plugins

        from vllm_ext.offline.model import slow_on_cpu

        load_general_plugins()
        known = set(ModelRegistry.get_supported_archs())
    except Exception as error:  # whatever keeps vLLM from importing is the finding
        yield Finding("import vllm", type(error).__name__, f"{error}; remove packages built for another torch")
        return
    name = current_platform.device_name or "unknown"
    slow = current_platform.is_cpu() and slow_on_cpu(torch.bfloat16)
    yield Finding("platform", name + " (bfloat16 is slow here: serve with --dtype float32)" * slow)
    for family in FAMILIES.values():
        registered = family.planned_architecture in known
        cure = None if registered else "vLLM does not list it; see the log above for what kept the plugin from loading"
        kinds = "" if family.kinds == KINDS else f" ({', '.join(family.kinds)})"
        yield Finding("family", family.architecture + kinds, cure)
