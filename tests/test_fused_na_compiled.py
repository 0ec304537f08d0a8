"""The kernels compile for a Hopper GPU, which takes none: what the interpreter cannot tell."""

import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver

from fused_na.triton import attention, gpu, plan
from fused_na.triton.geometry import Geometry
from fused_na.triton.launch import Launch, Prepared
from fused_na.triton.problem import Tensors, problem_of
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

    def compile_kernel(self: Launch, tensors: Tensors) -> None:
        arguments = self.arguments | {name: tensors[name] for name in self.tensors}
        arguments |= {name: describe(tensors[name]) for name, describe in self.bulk.items()}
        kernels.append(self.kernel.warmup(grid=self.grid, **arguments))

    monkeypatch.setattr(Launch, "__call__", compile_kernel)
    monkeypatch.setattr(gpu, "capability", lambda device: 9)
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
    plan.plan_of.cache_clear()
    attention.forward(query, key, value, axes, head_dim**-0.5, rpb, None, None)
    *_, kernel = compiled
    assert spilled_bytes(kernel) <= 8
    assert kernel.metadata.shared <= 232448
    assert ("setmaxnreg" in kernel.asm["ptx"]) == is_wide
    assert ("wgmma.mma_async" in kernel.asm["ptx"]) == (head_dim > 32)


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
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
def test_wide_backward(
    compiled: list[CompiledKernel], axes: tuple[Axis, ...], dtype: torch.dtype, is_packed: bool
) -> None:
    """Large windows get the wide kernels, which spill next to nothing and whose products ptxas keeps in flight."""
    query, key, value = torch.empty(1, *(axis.length for axis in axes), 3, 2, 128, dtype=dtype).unbind(-3)
    output, lse = torch.empty(query.shape, dtype=dtype), torch.empty(query.shape[:-1])
    plan.plan_of.cache_clear()
    attention.backward(output, lse, query, key, value, axes, 0.1, None, None, None, output, lse, False, is_packed)
    # Waits that leave two products in flight, one or two a loop over steps, two loops for each warpgroup: ptxas makes
    # others of them where it lets products wait for each other.
    for kernel, waits in zip(compiled, (4, 8), strict=True):
        assert "setmaxnreg" in kernel.asm["ptx"]
        assert spilled_bytes(kernel) <= 32
        assert len(re.findall(r"WARPGROUP.DEPBAR.LE gsb0, 0x2", dump(kernel, "-sass"))) == waits


@pytest.mark.parametrize(
    ("setting", "value", "allowed"),
    [
        ("allow_tf32", True, True),
        ("allow_tf32", False, False),
        ("fp32_precision", "tf32", True),
        ("fp32_precision", "ieee", False),
        ("fp32_precision", "none", False),
    ],
)
def test_both_of_the_settings_for_tf32(setting: str, value: bool | str, allowed: bool) -> None:
    """PyTorch's older one and its newer one."""
    query = torch.empty(1, 8, 1, 16)
    tensors: Tensors = dict.fromkeys(["query", "key", "value"], query)
    tensors |= dict.fromkeys(["rpb", "additional_keys", "additional_values"])
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    try:
        setattr(settings, setting, value)
        assert problem_of((Axis(8, 3),), 1.0, tensors).allow_tf32 == allowed
    finally:
        settings.fp32_precision = before


def test_only_hopper_has_the_wide_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    axes = (Axis(64, 40), Axis(64, 40))
    query = torch.empty(1, 64, 64, 3, 2, 128, dtype=torch.bfloat16).unbind(-3)[0]
    tensors: Tensors = dict(query=query, key=query, value=query, rpb=None)
    tensors |= dict(additional_keys=None, additional_values=None)
    for capability, is_wide in ((8, False), (9, True), (10, False), (12, False)):
        monkeypatch.setattr(gpu, "capability", lambda device, capability=capability: capability)
        workload = Geometry(problem_of(axes, 1.0, tensors)).workload
        for kernel in ("forward", "query", "key_value"):
            assert choose_tiles(kernel, workload).is_wide == is_wide


MAP, CLIP = (Axis(56, 7), Axis(56, 7)), (Axis(16, 7, 1, 1, True), Axis(56, 7), Axis(56, 7))
DILATED = (Axis(56, 7, 1, 8), Axis(56, 7, 1, 8))
HALF_OF_A_MULTIPROCESSOR = (228 << 10) // 2 - 1024  # of its shared memory; a program takes 1 KB more


def run_backward(
    axes: tuple[Axis, ...],
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 32,
    has_grad_lse: bool = False,
    additional: int | None = None,
    needs_rpb: bool = True,
    layout: str = "packed",
    batch: int = 3,
    is_packed: bool = False,
) -> None:
    """A backward pass of two heads with a bias, of whose kernels none runs."""
    packed = torch.empty(batch, *(axis.length for axis in axes), 3, 2, head_dim, dtype=dtype)
    query, key, value = packed.unbind(-3)
    if layout == "heads first":
        query = torch.empty(batch, 2, *(axis.length for axis in axes), head_dim, dtype=dtype).movedim(1, -2)
    output, lse = torch.empty(query.shape, dtype=dtype), torch.empty(query.shape[:-1])
    rpb = torch.zeros(2, *(2 * axis.kernel_size - 1 for axis in axes))
    more = None if additional is None else torch.empty(batch, additional, 2, head_dim, dtype=dtype)
    grad_lse = lse if has_grad_lse else None
    attention.backward(
        output, grad_lse, query, key, value, axes, 1.0, rpb, more, more, output, lse, needs_rpb, is_packed
    )


@pytest.mark.parametrize("has_rpb", [True, False], ids=["rpb", "none"])
def test_forward_waits_for_the_copy_of_the_bias(compiled: list[CompiledKernel], has_rpb: bool) -> None:
    """It may start before the copy is there, which is launched just before, and nothing else overlaps."""
    plan.plan_of.cache_clear()
    packed = torch.empty(2, 14, 14, 3, 2, 32, dtype=torch.bfloat16)
    rpb = torch.zeros(2, 13, 13) if has_rpb else None
    attention.forward(*packed.unbind(-3), MAP, 1.0, rpb, None, None)
    *copies, forward = compiled
    assert [kernel.metadata.name for kernel in copies] == ["bias_copy_kernel"] * has_rpb
    assert all("griddepcontrol.launch_dependents" in kernel.asm["ptx"] for kernel in copies)
    assert ("griddepcontrol.wait" in forward.asm["ptx"]) == forward.metadata.launch_pdl == has_rpb
    assert not any(kernel.metadata.launch_pdl for kernel in copies)


@pytest.mark.parametrize("is_packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("has_rpb", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("batch", [3, 128], ids=["", "several samples"])
@pytest.mark.parametrize("axes", [MAP, CLIP, DILATED], ids=["map", "clip", "dilated map"])
def test_columns(
    compiled: list[CompiledKernel],
    prefers_columns: Callable[[int], None],
    axes: tuple[Axis, ...],
    batch: int,
    has_rpb: bool,
    is_packed: bool,
) -> None:
    """Kernels whose steps spill little, of which a multiprocessor runs eight or more at once."""
    prefers_columns(64 if len(axes) == 3 else 32)
    plan.plan_of.cache_clear()
    run_backward(axes, needs_rpb=has_rpb, is_packed=is_packed, batch=batch)
    kernels = {kernel.metadata.name: kernel for kernel in compiled}
    backward = ["query_columns_kernel"]
    if has_rpb:
        backward = ["query_bias_columns_kernel", "sum_classes_kernel", "fold_columns_kernel"]
    assert list(kernels) == ["bias_copy_kernel", *backward, "key_value_columns_kernel"]
    for name in (backward[0], "key_value_columns_kernel"):
        assert kernels[name].metadata.shared <= HALF_OF_A_MULTIPROCESSOR // 4
        assert spilled_bytes(kernels[name]) <= 128
    assert ("griddepcontrol.wait" in kernels[backward[0]].asm["ptx"]) == has_rpb
    # Sums of maps stay in shared memory.
    assert ("L2::evict_last" in kernels[backward[0]].asm["ptx"]) == (has_rpb and len(axes) == 3)
    if has_rpb:  # all loads of a step are under way before the first addition
        assert not any(spilled_bytes(kernels[name]) for name in backward[1:])
        loads_and_additions = re.findall(r"(LDG|FADD)", dump(kernels["sum_classes_kernel"], "-sass"))
        assert loads_and_additions[:8] == ["LDG"] * 8


def test_columns_compile_once(compiled: list[CompiledKernel], prefers_columns: Callable[[int], None]) -> None:
    """For clips of as many frames and any size whose columns lie alike, any batch and, but for the additions of rows,
    any number of heads."""
    prefers_columns(64)
    plan.plan_of.cache_clear()
    for length, batch in ((56, 4), (28, 3), (112, 16), (84, 33)):
        run_backward((Axis(16, 7), Axis(length, 7), Axis(length, 7)), batch=batch)
    folds = "sum_classes_kernel", "fold_columns_kernel"
    for name in ("query_bias_columns_kernel", *folds, "key_value_columns_kernel"):
        kernels = [kernel for kernel in compiled if kernel.metadata.name == name]
        assert len(kernels) == 4 and len({kernel.hash for kernel in kernels}) == 1


@pytest.mark.parametrize(
    ("options", "is_fused"),
    [
        (dict(axes=MAP), True),
        (dict(axes=MAP, dtype=torch.float16, has_grad_lse=True), True),
        (dict(axes=CLIP), True),
        (dict(axes=(Axis(13, 5, 2), Axis(19, 7, 3))), True),
        (dict(axes=MAP, dtype=torch.float32), False),
        (dict(axes=MAP, head_dim=64), False),
        (dict(axes=MAP, needs_rpb=False), False),
        (dict(axes=MAP, additional=2), False),
        (dict(axes=MAP, layout="heads first"), False),
        (dict(axes=(Axis(56, 7, 1, 2), Axis(56, 7))), True),
        (dict(axes=(Axis(16, 7, 1, 2), Axis(56, 7, 1, 4), Axis(56, 7))), True),
        (dict(axes=(Axis(57, 7, 1, 2), Axis(56, 7))), False),
        (dict(axes=(Axis(300, 7),)), False),
        (dict(axes=(Axis(1024, 3), Axis(8, 3))), True),
        (dict(axes=(Axis(56, 23), Axis(56, 23))), False),
        (dict(axes=(Axis(8, 2), Axis(16, 16), Axis(16, 16))), True),
        (dict(axes=(Axis(200, 12, 11), Axis(800, 5, 3))), True),
        (dict(axes=(Axis(8, 3), Axis(400, 5, 3), Axis(400, 5, 3))), False),  # too many classes of columns
    ],
)
def test_where_query_and_bias_share_a_kernel(
    compiled: list[CompiledKernel], options: dict, is_fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = []
    monkeypatch.setattr(plan.Plan, "run", lambda self, tensors: planned.append(self.kernel))
    monkeypatch.setattr(attention, "prepare_additional", lambda problem: Prepared([], {"partial_keys": (1,)}))
    monkeypatch.setattr(Prepared, "run", lambda *x: dict.fromkeys(("partial_keys", "partial_values"), torch.zeros(1)))
    run_backward(**options)
    if is_fused:
        assert planned == ["query_bias", "key_value"]
    else:
        assert planned == ["query", "key_value", "bias"][: 2 + options.get("needs_rpb", True)]


def test_only_hopper_fuses_query_and_bias(compiled: list[CompiledKernel], monkeypatch: pytest.MonkeyPatch) -> None:
    planned = []
    monkeypatch.setattr(plan.Plan, "run", lambda self, tensors: planned.append(self.kernel))
    for capability in (8, 9, 10):
        monkeypatch.setattr(gpu, "capability", lambda device, capability=capability: capability)
        plan.fuses_bias.cache_clear()
        run_backward(MAP)
    assert planned == ["query", "key_value", "bias", "query_bias", "key_value", "query", "key_value", "bias"]
    plan.fuses_bias.cache_clear()
