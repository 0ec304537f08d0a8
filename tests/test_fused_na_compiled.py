"""The kernels compile for a Hopper GPU, which takes none: what the interpreter cannot tell."""

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fused_na.triton import launch
from fused_na.triton.tiles import choose_tiles
from fused_na.window import Axis

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class HopperDriver:
    """As much of Triton's driver as its compiler asks."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[CompiledKernel]:
    """Kernels in the order in which they are launched, of which none runs."""
    kernels: list[CompiledKernel] = []

    def compile_kernel(self: launch.Launch, tensors: launch.Tensors) -> None:
        arguments = self.arguments | {name: tensors[name] for name in self.tensors}
        arguments |= {name: describe(tensors[name]) for name, describe in self.bulk.items()}
        kernels.append(self.kernel.warmup(grid=self.grid, **arguments))

    monkeypatch.setattr(launch.Launch, "__call__", compile_kernel)
    monkeypatch.setattr(launch, "_capability", lambda device: 9)
    monkeypatch.setattr(driver, "_active", HopperDriver())
    return kernels


def dump(kernel: CompiledKernel, what: str) -> str:
    """What NVIDIA's `cuobjdump` tells of a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([CUOBJDUMP, what, file.name], capture_output=True, text=True, check=True).stdout


def spilled_bytes(kernel: CompiledKernel) -> int:
    """What a thread keeps in memory for lack of registers."""
    found = re.search(r"STACK:(\d+)", dump(kernel, "-res-usage"))
    assert found is not None
    return int(found[1])


@pytest.mark.parametrize(
    ("axes", "head_dim", "has_rpb", "is_wide"),
    [
        ((Axis(30, 18), Axis(48, 24), Axis(80, 24)), 128, False, True),
        ((Axis(30, 9), Axis(48, 15), Axis(80, 15)), 64, False, False),
        ((Axis(56, 7), Axis(56, 7)), 32, False, False),
        ((Axis(56, 7), Axis(56, 7)), 32, True, False),
    ],
    ids=["wide", "narrow", "small", "biased"],
)
def test_forward(
    compiled: list[CompiledKernel], axes: tuple[Axis, ...], head_dim: int, has_rpb: bool, is_wide: bool
) -> None:
    """The benchmarks' problems spill next to nothing, and the wide kernel is what large windows get."""
    packed = torch.empty(1, *(axis.length for axis in axes), 3, 2, head_dim, dtype=torch.bfloat16)
    query, key, value = packed.unbind(-3)
    rpb = torch.zeros(2, *(2 * axis.kernel_size - 1 for axis in axes)) if has_rpb else None
    launch.plan.cache_clear()
    launch.forward(query, key, value, axes, head_dim**-0.5, rpb, None, None)
    (kernel,) = compiled
    assert spilled_bytes(kernel) <= 8
    assert kernel.metadata.shared <= 232448
    assert ("setmaxnreg" in kernel.asm["ptx"]) == is_wide
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (head_dim > 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "axes",
    [
        (Axis(96, 48, 16), Axis(96, 48, 16)),
        (Axis(96, 49), Axis(96, 48)),
        (Axis(30, 18, 1, 1, True), Axis(48, 24), Axis(80, 24)),
        (Axis(8192, 2048),),
    ],
    ids=["strided", "map", "causal clip", "sequence"],
)
def test_wide_backward(compiled: list[CompiledKernel], axes: tuple[Axis, ...], dtype: torch.dtype) -> None:
    """Large windows get the wide kernels, which spill next to nothing and whose products ptxas keeps in flight."""
    query, key, value = torch.empty(1, *(axis.length for axis in axes), 3, 2, 128, dtype=dtype).unbind(-3)
    output, lse = torch.empty(query.shape, dtype=dtype), torch.empty(query.shape[:-1])
    launch.plan.cache_clear()
    launch.backward(output, lse, query, key, value, axes, 0.1, None, None, None, output, lse, False)
    assert len(compiled) == 2
    for kernel in compiled:
        assert "setmaxnreg" in kernel.asm["ptx"]
        assert spilled_bytes(kernel) <= 32
        assert re.search(r"WARPGROUP.DEPBAR.LE gsb0, 0x2", dump(kernel, "-sass"))  # else one waits for another


def test_only_hopper_has_the_wide_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = (Axis(64, 40), Axis(64, 40))
    query = torch.empty(1, 64, 64, 3, 2, 128, dtype=torch.bfloat16).unbind(-3)[0]
    tensors: launch.Tensors = dict(query=query, key=query, value=query, rpb=None)
    tensors |= dict(additional_keys=None, additional_values=None)
    for capability, is_wide in ((8, False), (9, True), (10, False), (12, False)):
        monkeypatch.setattr(launch, "_capability", lambda device, capability=capability: capability)
        workload = launch.Geometry(launch.problem_of(axes, 1.0, tensors)).workload
        for kernel in ("forward", "query", "key_value"):
            assert choose_tiles(kernel, workload).is_wide == is_wide
