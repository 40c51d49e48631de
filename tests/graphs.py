"""CUDA graphs in this process, on a CPU: what a capture records, and whose memory a replay overwrites.

A graph is the list of operations that ran in its capture, each on the very memory it ran on; none of the Python around
them runs again. What is allocated in a capture is of a pool, which all graphs share. It goes back there when no tensor
is left, and any other graph may be given it. So a replay overwrites all of the pool that was not held when its graph
was captured, with bytes that are no number. What a graph reads from outside of the pool has to be held for good.
Whatever would wait for the GPU fails in a capture.

It is vLLM's own code that captures and replays, pieces between attention or whole steps. Dynamo's graphs are run as
they are, since nothing sees into Inductor's kernels for CPUs.
"""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only
from vllm.forward_context import is_forward_context_available

WAITS = {"_local_scalar_dense", "_unique2", "equal", "is_nonzero", "masked_select", "nonzero"}
"""What needs a result on the host."""


@dataclass(eq=False)
class Memory:
    """What one allocation got."""

    storage: torch.UntypedStorage
    graph: "Graph | None"
    """The one in whose capture it was allocated, from the pool."""

    @property
    def held(self) -> bool:
        """Whether a tensor is left."""
        return torch._C._storage_Use_Count(self.storage._cdata) > 1

    def overwrite(self) -> None:
        """As another graph may: floating-point numbers become NaN."""
        ctypes.memset(self.storage.data_ptr(), 0xFF, self.storage.nbytes())


MEMORY: dict[int, Memory] = {}
"""By address, all that graphs read or wrote. Kept, so that no address comes twice."""


def at(tensor: Any) -> Any:
    """The same memory as a tensor that does not hold it: vLLM's `weak_ref_tensor`, for CPUs."""
    if not isinstance(tensor, torch.Tensor) or not tensor.untyped_storage().nbytes():
        return tensor
    storage = tensor.untyped_storage()
    raw = (ctypes.c_ubyte * storage.nbytes()).from_address(storage.data_ptr())
    place = torch.frombuffer(raw, dtype=torch.uint8).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(place, tensor.storage_offset(), tensor.size(), tensor.stride())


def tensors(tree: Any) -> list[torch.Tensor]:
    """All tensors in a tree of arguments."""
    return [each for each in tree_leaves(tree) if isinstance(each, torch.Tensor)]


def held() -> set[Memory]:
    """All known memory that a tensor is left of."""
    return {memory for memory in MEMORY.values() if memory.held}


class Graph:
    """In place of `torch.cuda.CUDAGraph`."""

    capturing: ClassVar["Graph | None"] = None
    captured: ClassVar["set[Graph]"] = set()
    replayed: ClassVar["set[Graph]"] = set()

    def __init__(self) -> None:
        self.steps: list[Callable[[], None]] = []
        self.read: set[Memory] = set()
        self.before = self.after = set[Memory]()
        self.whole = not is_forward_context_available()
        """Whether it is of a whole step, which vLLM captures from outside of the forward pass."""

    def note(self, given: Any, made: Any) -> set[int]:
        """Know of an operation's memory; returns the addresses of what it allocated."""
        for storage in (each.untyped_storage() for each in tensors(given)):
            if storage.nbytes():
                memory = MEMORY.setdefault(storage.data_ptr(), Memory(storage, None))
                if memory.graph is None:
                    self.read.add(memory)
        new = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors(made)}
        new = {address: storage for address, storage in new.items() if address not in MEMORY and storage.nbytes()}
        MEMORY.update((address, Memory(storage, self)) for address, storage in new.items())
        return set(new)

    def replay(self) -> None:
        """Run what was recorded, where it was recorded."""
        Graph.replayed.add(self)
        if not all(memory.held for memory in self.read):
            raise RuntimeError("a graph reads memory that was given back since it was captured")
        others = [each for each in MEMORY.values() if each.graph not in (None, self)]
        for memory in others:
            if memory not in self.before:
                memory.overwrite()
        for step in self.steps:
            step()
        for memory in others:
            if memory not in self.after:
                memory.overwrite()


def forget() -> None:
    """Know of no graph and no memory."""
    for known in (MEMORY, Graph.captured, Graph.replayed):
        known.clear()


class Recording(TorchDispatchMode):
    """Sees each operation of a capture."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._opname
        masked = name.startswith("index") and any(each.dtype == torch.bool for each in tensors(args[1:2]))
        if name in WAITS or masked:
            raise RuntimeError(f"{func} waits for the GPU in a capture")
        if func.namespace == "vllm":  # in Python: what that runs is what is recorded
            with self:
                return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **kwargs)
        made = func(*args, **kwargs)
        new = self.graph.note((args, kwargs), made)
        if func._schema.is_mutable or (new and not name.startswith(("empty", "new_empty"))):
            places = [at(each) if each.untyped_storage().data_ptr() in new else None for each in tensors(made)]
            given, named = tree_map_only(torch.Tensor, at, (args, kwargs))

            def step() -> None:
                for place, again in zip(places, tensors(func(*given, **named)), strict=True):
                    if place is not None:
                        place.copy_(again)

            self.graph.steps.append(step)
        return made


@contextmanager
def capture(graph: Graph, pool: Any = None, **_: Any) -> Iterator[None]:
    """In place of `torch.cuda.graph`."""
    graph.before = held()
    Graph.capturing = graph
    try:
        with Recording(graph):
            yield
    finally:
        Graph.capturing = None
    graph.after = held()
    Graph.captured.add(graph)


@contextmanager
def graphs() -> Iterator[None]:
    """vLLM captures and replays them, as on a GPU; here with Triton's interpreter.

    Raises:
        AssertionError: if none was replayed of those that were captured, of pieces or of whole steps.

    """
    from triton.runtime.interpreter import GridExecutor
    from vllm.platforms import current_platform
    from vllm.utils import torch_utils
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.workspace import init_workspace_manager

    platform = type(current_platform)
    check, launch, warm_up = platform.check_and_update_config, GridExecutor.__call__, CPUWorker.compile_or_warm_up_model

    def leave_on(vllm_config: Any) -> None:
        config = vllm_config.compilation_config
        asked = {name: getattr(config, name) for name in ("mode", "backend", "cudagraph_capture_sizes")}
        check(vllm_config)
        vars(config).update(asked)

    def launched(kernel: GridExecutor, *args: Any, **named: Any) -> None:
        graph = Graph.capturing
        with _disable_current_modes():
            launch(kernel, *args, **named)
            if graph is not None:
                graph.note((args, named), ())
                given, by_name = tree_map_only(torch.Tensor, at, (args, named))
                graph.steps.append(lambda: launch(kernel, *given, **by_name))

    def warmed_up(worker: CPUWorker) -> Any:
        times = warm_up(worker)
        init_workspace_manager(worker.device)
        worker.model_runner.capture_model()
        return times

    forget()
    wrapper = "vllm.compilation.cuda_graph.CUDAGraphWrapper"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "check_and_update_config", staticmethod(leave_on))
        patch.setattr(platform, "support_static_graph_mode", classmethod(lambda _: True))
        patch.setattr(platform, "get_static_graph_wrapper_cls", classmethod(lambda _: wrapper))
        patch.setattr(platform, "graph_pool_handle", classmethod(lambda _: (0, 0)), raising=False)
        patch.setattr(torch_utils, "weak_ref_tensor", at)
        patch.setattr(torch.cuda, "CUDAGraph", Graph)
        patch.setattr(torch.cuda, "graph", capture)
        patch.setattr(GridExecutor, "__call__", launched)
        patch.setattr(CPUWorker, "compile_or_warm_up_model", warmed_up)
        yield
    kinds, seen = ({each.whole for each in some} for some in (Graph.captured, Graph.replayed))
    assert kinds, "no graph was captured"
    assert kinds == seen, "captured graphs were not replayed"
