"""Kernels with all their arguments but the tensors, so that an eager call costs little time on the host."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel

from fused_na.triton.problem import Tensors


class Descriptor(NamedTuple):
    """As much as a launch reads of a descriptor for the bulk copy engine, of which a new one would be checked anew."""

    base: Tensor | None
    shape: list[int]
    strides: list[int]
    padding: str


class Launch:
    """A kernel with its grid and all its arguments but the tensors; called with these, it runs.

    Args:
        kernel: the kernel.
        programs: how many programs of it run.
        arguments: by name, all but the tensors, and Triton's options.
        bulk: by name of the tensors that it takes as descriptors for the bulk copy engine, what describes one.
    """

    def __init__(
        self, kernel: Any, programs: int, arguments: dict, bulk: Mapping[str, Callable[[Any], Any]] | None = None
    ) -> None:
        self.kernel, self.grid = kernel, (programs, 1, 1)
        known = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg", "launch_pdl"}
        self.arguments = {name: x for name, x in arguments.items() if name in known}
        self.tensors = [name for name in kernel.arg_names if name not in arguments]
        self.bulk = bulk or {}
        self.compiled: CompiledKernel | None = None

    def __call__(self, tensors: Tensors) -> None:
        if self.compiled is None:
            self._compile(tensors)
            return
        arguments = self.template.copy()
        for place, name in self.places:
            arguments[place] = tensors[name]
        for place, name, layout in self.descriptors:
            arguments[place] = Descriptor(tensors[name], *layout)
        self.compiled[self.grid](*arguments)

    def _compile(self, tensors: Tensors) -> None:
        """Runs by way of Triton's compiler and its caches, and keeps what it gives."""
        arguments = self.arguments | {name: tensors[name] for name in self.tensors}
        descriptors = {name: describe(tensors[name]) for name, describe in self.bulk.items()}
        compiled = self.kernel[self.grid](**(arguments | descriptors))
        if not isinstance(compiled, CompiledKernel):  # Triton's interpreter has none
            return
        names = self.kernel.arg_names
        self.template = [self.arguments.get(name) for name in names]
        self.places = [(names.index(name), name) for name in self.tensors if name not in self.bulk]
        self.descriptors = [
            (names.index(name), name, (x.shape, x.strides, x.padding)) for name, x in descriptors.items()
        ]
        self.compiled = compiled


class Prepared(NamedTuple):
    """How a kernel runs with certain tiles: its launches, in order, and the shapes of float32 workspaces by name."""

    launches: list[Launch]
    workspaces: dict[str, tuple[int, ...]] = {}

    def run(self, tensors: Tensors, device: torch.device) -> Tensors:
        """Launches; returns the workspaces."""
        workspaces: Tensors = {
            name: torch.empty(shape, dtype=torch.float32, device=device) for name, shape in self.workspaces.items()
        }
        tensors = tensors | workspaces
        for launch in self.launches:
            launch(tensors)
        return workspaces
