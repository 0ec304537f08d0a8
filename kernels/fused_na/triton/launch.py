"""Launches the kernels on checked arguments.

All that a launch needs, the tensors' addresses aside, follows from a `Problem`. A `Plan` works it out once, so that
eager calls cost little time on the host.
"""

from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache, lru_cache, partial
from math import ceil, prod
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonTensorDescriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from fused_na.triton import autotune
from fused_na.triton.backward import additional_kernel, bias_fold_kernel, bias_kernel, key_value_kernel, query_kernel
from fused_na.triton.bias_copy import bias_copy_kernel
from fused_na.triton.forward import forward_kernel
from fused_na.triton.forward_wide import forward_wide_kernel
from fused_na.triton.key_value_wide import key_value_wide_kernel
from fused_na.triton.query_bias import fold_kernel, query_bias_kernel, sum_kernel
from fused_na.triton.query_bias_clips import fold_rows_kernel, query_bias_clips_kernel
from fused_na.triton.query_wide import query_wide_kernel
from fused_na.triton.slots import CLIPS_PROGRAMS, PROGRAMS, SAMPLES, SLOT, Slots, odd, shares, slots_of
from fused_na.triton.tiles import (
    HOPPER_SHARED_MEMORY,
    Extent,
    Tiles,
    Workload,
    always_one_tile,
    as_three_axes,
    block_width,
    can_lie_inside,
    choose_tiles,
    half,
    regime,
)
from fused_na.window import Axis, group_members

LARGEST_TILE = 128  # tokens of a tile along an axis
PARTIAL_BYTES = 64 << 20  # memory that the partial sums of the bias gradient may take
ACCUMULATOR_BYTES = 40 << 10  # shared memory of the sums of a program of `query_bias_kernel`
LEAST_CLIPS = 3  # for `query_bias_clips_kernel`, which leaves one warp of four idle then
SPLITS = 16  # most parts in which the programs of a class are added up

Tile = tuple[int, int, int, int]  # samples, and sizes along t, h and w
Tensors = dict[str, Tensor | None]  # by the names of the kernels' arguments


class Layout(NamedTuple):
    """A tensor without its address, of which only the alignment matters to a launch."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    is_aligned: bool  # to 16 bytes

    @property
    def spatial_strides(self) -> tuple[int, ...]:
        """Strides of batch, t, h, w and heads, with the axes placed as by `as_three_axes`."""
        batch, *spatial, heads, _ = self.strides
        t, h, w = {1: [0, 0, *spatial], 2: [spatial[0], 0, spatial[-1]], 3: spatial}[len(spatial)]
        return batch, t, h, w, heads


def _layout(x: Tensor | None) -> Layout | None:
    return None if x is None else Layout(x.shape, x.stride(), x.dtype, x.data_ptr() % 16 == 0)


def _contiguous(shape: tuple[int, ...], dtype: torch.dtype) -> Layout:
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Layout(shape, strides, dtype, is_aligned=True)


class Problem(NamedTuple):
    """What the launches of a forward or backward pass depend on."""

    device: torch.device
    axes: tuple[Axis, ...]
    scale: float
    allow_tf32: bool
    is_autotuned: bool
    query: Layout
    key: Layout
    value: Layout
    rpb: Layout | None
    additional_keys: Layout | None
    additional_values: Layout | None
    grad_output: Layout | None = None
    grad_lse: Layout | None = None
    output: Layout | None = None
    lse: Layout | None = None
    grad_rpb: Layout | None = None


def problem_of(axes: tuple[Axis, ...], scale: float, tensors: Tensors) -> Problem:
    """The problem of tensors that are named as its layouts are."""
    query = tensors["query"]
    assert query is not None
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    layouts: dict[str, Any] = {name: _layout(x) for name, x in tensors.items()}
    return Problem(query.device, axes, scale, allow_tf32, autotune.is_enabled(), **layouts)


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
        known = {*kernel.arg_names, "num_warps", "num_stages", "maxnreg"}
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


class Plan:
    """One kernel of a problem, a key of `PREPARE`, with its tiles once it has run."""

    def __init__(self, kernel: str, problem: Problem) -> None:
        self.kernel, self.problem = kernel, problem
        self.prepared: Prepared | None = None

    def run(self, tensors: Tensors) -> Tensors:
        """Launches the kernel on the tensors that it reads and writes; returns its workspaces."""
        device = self.problem.device
        if self.prepared is not None:
            return self.prepared.run(tensors, device)
        geometry = Geometry(self.problem)
        prepared = cache(lambda tiles: PREPARE[self.kernel](geometry, tiles))
        tiles = None
        is_measured = self.problem.is_autotuned and self.kernel != "query_bias"  # of which there is one choice
        if is_measured:
            tiles = autotune.measured_tiles(
                self.kernel, geometry.workload, lambda tiles: prepared(tiles).run(tensors, device)
            )
        choice = prepared(tiles or choose_tiles(self.kernel, geometry.workload))
        if tiles or not is_measured:  # else nothing could be measured yet
            self.prepared = choice
        return choice.run(tensors, device)


@lru_cache(maxsize=4096)
def plan(kernel: str, problem: Problem) -> Plan:
    """The plan that all calls on a problem share."""
    return Plan(kernel, problem)


class Geometry:
    """What the kernels of a problem have in common.

    Attributes:
        workload: what tiles are chosen for.
        output: how the output of the forward pass lies in memory.
        arguments: of all kernels, by name.
    """

    def __init__(self, problem: Problem) -> None:
        query, key, value = problem.query, problem.key, problem.value
        t, h, w = as_three_axes(problem.axes)
        self.problem = problem
        self.batch, self.heads, self.heads_kv = query.shape[0], query.shape[-2], key.shape[-2]
        self.head_dim, self.head_dim_v, itemsize = query.shape[-1], value.shape[-1], query.dtype.itemsize
        has_rpb, shared_memory = problem.rpb is not None, _shared_memory(problem.device)
        self.groups = t.dilation * h.dilation * w.dilation
        read = {"query": query, "key": key, "value": value, "grad_output": problem.grad_output}
        layouts = {name: layout for name, layout in read.items() if layout is not None}
        self.output = _contiguous((*query.shape[:-1], self.head_dim_v), query.dtype)
        is_wide = (
            _capability(problem.device) == 9
            and itemsize == 2
            and self.head_dim == self.head_dim_v == 128
            and self.groups == 1
            and not has_rpb
            and problem.additional_keys is None
            and all(map(self.can_copy_in_bulk, layouts.values()))
        )
        self.workload = Workload(
            problem.axes, self.head_dim, self.head_dim_v, itemsize, has_rpb, shared_memory, is_wide
        )
        # A tensor's last element decides whether 32-bit offsets reach within a sample; outputs are contiguous in the
        # tokens.
        reach = [
            sum((n - 1) * stride for n, stride in zip(layout.shape[1:], layout.strides[1:], strict=True))
            for layout in layouts.values()
        ]
        contiguous = prod(axis.length for axis in problem.axes) * self.heads * max(self.head_dim, self.head_dim_v)
        self.arguments: dict[str, Any] = {
            "scale": problem.scale,
            "length_t": t.length,
            "length_h": h.length,
            "length_w": w.length,
            "dilations": (t.dilation, h.dilation, w.dilation),
            "batches": self.batch,
            "heads": self.heads,
            "HEADS_PER_KV": self.heads // self.heads_kv,
            "KERNEL": (t.kernel_size, h.kernel_size, w.kernel_size),
            "STRIDE": (t.stride, h.stride, w.stride),
            "CAUSAL": (t.is_causal, h.is_causal, w.is_causal),
            "HEAD_DIM": self.head_dim,
            "HEAD_DIM_V": self.head_dim_v,
            "BLOCK_D": block_width(self.head_dim),
            "BLOCK_DV": block_width(self.head_dim_v),
            "DILATED": self.groups > 1,
            "WIDE": max(*reach, contiguous) >= 2**31,
            "PRECISION": "tf32" if query.dtype == torch.float32 and problem.allow_tf32 else "ieee",
        }
        self.arguments |= {f"{name}_strides": layout.spatial_strides for name, layout in layouts.items()}
        for name in ("additional_keys", "additional_values"):
            layout = getattr(problem, name)
            self.arguments[f"{name}_strides"] = (0, 0, 0) if layout is None else layout.strides[:3]
        self.arguments["additional"] = 0 if problem.additional_keys is None else problem.additional_keys.shape[1]

    def launch(
        self,
        kernel: Any,
        tiles: Tiles,
        own: Extent,
        heads: int,
        moving: dict[str, Extent],
        own_tensors: tuple[str, ...] = (),
        samples: int = 1,
        **more: Any,
    ) -> Launch:
        """A launch of a kernel.

        Args:
            kernel: the kernel.
            tiles: how it runs.
            own: extents of a program's own tile.
            heads: that have programs of their own.
            moving: by tensor, extents of the tiles that it loops over.
            own_tensors: of which its own tile is loaded or stored. Both go through the bulk copy engine where that was
                chosen and the machine and the layouts allow it.
            samples: of a tile that is copied in bulk.
            more: arguments of its own. `programs` is how many run; by default one for each tile, head and sample.
        """
        counts = self.tiles_per_axis(own)
        dilations = (axis.dilation for axis in as_three_axes(self.problem.axes))
        arguments = self.arguments | {
            "programs": self.groups * prod(counts) * heads * self.batch,
            "divisors": tuple(map(divisor, (*counts, *dilations, heads))),
            "QUERY_TILE": tiles.query,
            "KEY_TILE": tiles.key,
            "STAGES": tiles.num_stages,
            "INTERIOR": self.has_interior(tiles),
            "ONE_TILE": tuple(map(always_one_tile, as_three_axes(self.problem.axes), tiles.query, tiles.key)),
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
            "maxnreg": tiles.max_registers,
            **more,
        }
        # In products of warpgroups an own tile that is copied in bulk gave a wrong output at head_dim 64 (Triton 3.6),
        # and slower gradients.
        copied = moving | (dict.fromkeys(own_tensors, own) if tiles.num_warps < 4 else {})
        layouts = {name: self.layout(name) for name in copied}
        arguments["TMA"] = tiles.bulk and all(map(self.can_copy_in_bulk, layouts.values()))
        assert arguments["TMA"] or not tiles.is_wide
        arguments["OWN_TMA"] = arguments["TMA"] and len(copied) > len(moving)
        bulk = {}
        if arguments["TMA"]:
            describe = _describe_for_gluon if isinstance(kernel, GluonJITFunction) else _describe
            axes = as_three_axes(self.problem.axes)
            bulk = {name: partial(describe, layout, axes, (samples, *copied[name])) for name, layout in layouts.items()}
        return Launch(kernel, arguments.pop("programs"), arguments, bulk)

    def layout(self, name: str) -> Layout:
        """How a tensor lies in memory: as it was given, or contiguous if a kernel writes it."""
        given = getattr(self.problem, name, None)
        if given is not None:
            return given
        if name == "output":
            return self.output
        of = getattr(self.problem, name.removeprefix("grad_"))
        return _contiguous(of.shape, of.dtype)

    def can_copy_in_bulk(self, layout: Layout) -> bool:
        """Whether tiles of a tensor can be loaded by Hopper's bulk copy engine: heads side by side, 16-byte steps, and
        no axis along which it repeats itself, as expanded tensors do. With dilation also groups of one size, and tokens
        at an even distance."""
        *strides, heads = layout.spatial_strides
        sizes, axes = layout.shape[:-2], self.problem.axes
        is_even = all(
            n == 1 or layout.strides[i] == prod(sizes[i + 1 :]) * layout.strides[-3] for i, n in enumerate(sizes)
        )
        return (
            _capability(self.problem.device) >= 9
            and layout.shape[-1] in (16, 32, 64, 128, 256)
            and heads == layout.shape[-1]
            and layout.is_aligned
            and all(stride * layout.dtype.itemsize % 16 == 0 and stride >= 0 for stride in strides)
            and strides[0] > 0
            and strides[3] > 0
            and all(stride > 0 for size, stride in zip(layout.shape, layout.strides, strict=True) if size > 1)
            and (self.groups == 1 or is_even and not any(axis.length % axis.dilation for axis in axes))
        )

    @property
    def fuses_bias(self) -> bool:
        """Whether the query's and the bias's gradients come from one kernel, `query_bias_kernel` or of several clips
        `query_bias_clips_kernel`: for small windows on Hopper, if a program's sums leave shared memory for others.
        """
        problem, axes = self.problem, self.problem.axes
        read = (problem.query, problem.key, problem.value, problem.grad_output, problem.output)
        if not (
            problem.grad_rpb is not None
            and problem.additional_keys is None
            and _capability(problem.device) == 9
            and regime(self.workload) in ("small", "small volume")
            and self.head_dim == self.head_dim_v == 32
            and len(axes) > 1
            and not self.arguments["WIDE"]
            and all(layout is not None and self.can_copy_in_bulk(layout) for layout in read)
        ):
            return False
        slots = self.slots
        least = self.heads * self.groups * slots.classes * slots.bytes
        return slots.bytes <= ACCUMULATOR_BYTES and least <= PARTIAL_BYTES

    @property
    def slots(self) -> Slots:
        """Of the kernels that `fuses_bias` names, for each dilation group, which have one size."""
        tiles = choose_tiles("query_bias", self.workload)
        axes = (axis._replace(length=axis.length // axis.dilation, dilation=1) for axis in self.problem.axes)
        return slots_of(tuple(axes), tiles.query, tiles.key)

    def has_interior(self, tiles: Tiles) -> bool:
        """Whether a pair of tiles can lie wholly inside the neighborhood, where nothing is to be masked or added."""
        axes = as_three_axes(self.problem.axes)
        return self.problem.rpb is None and can_lie_inside(axes, tiles.query, tiles.key)

    def tiles_per_axis(self, extent: Extent) -> list[int]:
        """Tiles of the largest dilation group along each axis."""
        axes = as_three_axes(self.problem.axes)
        return [ceil(group_members(axis, 0) / size) for axis, size in zip(axes, extent, strict=True)]


def _described(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Tile) -> tuple[list[int], ...]:
    """Shape, strides and block of tiles of one head, of a tensor seen as `[B, t, h, w, heads * head_dim]`.

    With dilation t, h and w are those of a group, and in place of samples the tokens of all of them count, from any of
    which on a group can lie (`neighborhood.copy_origin`): a view that overlaps itself.
    """
    batch, heads, width = layout.shape[0], *layout.shape[-2:]
    stride, *others, stride_w, _ = layout.spatial_strides
    if any(axis.dilation > 1 for axis in axes):
        batch, stride = batch * prod(axis.length for axis in axes), stride_w
    members = [axis.length // axis.dilation for axis in axes]
    # Axes of length 1 need a legal stride all the same.
    steps = [(x or stride_w) * axis.dilation for x, axis in zip((*others, stride_w), axes, strict=True)]
    return [batch, *members, heads * width], [stride, *steps, 1], [*tile, width]


def _describe(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Tile, x: Tensor) -> TensorDescriptor:
    return TensorDescriptor(x, *_described(layout, axes, tile))


def _describe_for_gluon(layout: Layout, axes: tuple[Axis, Axis, Axis], tile: Tile, x: Tensor) -> GluonTensorDescriptor:
    shape, strides, block = _described(layout, axes, tile)
    element = gl.bfloat16 if layout.dtype == torch.bfloat16 else gl.float16
    return GluonTensorDescriptor(x, shape, strides, block, gl.NVMMASharedLayout.get_default_for(block, element))


def divisor(number: int) -> int:
    """A division by a number from 1 to 2**31 - 1 as a multiplication, for `neighborhood.divided`: its multiplier, from
    the eighth bit on, and a shift. It is odd, lest Triton compile anew for values that are divisible by 16.
    """
    shift = (number - 1).bit_length()
    return ceil(Fraction(1 << 31 + shift, number)) << 8 | shift << 1 | 1


def _capability(device: torch.device) -> int:
    """The major number of a GPU's compute capability: bulk copies come with 9, which Hopper has; 0 of a CPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return HOPPER_SHARED_MEMORY
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]


def _forward(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"key": tiles.key, "value": tiles.key}
    if tiles.is_wide:
        return _wide(geometry, forward_wide_kernel, tiles, tiles.query, geometry.heads, moving, ("query", "output"))
    own = "query", "output"
    return Prepared([geometry.launch(forward_kernel, tiles, tiles.query, geometry.heads, moving, own)])


def _wide(
    geometry: Geometry,
    kernel: Any,
    tiles: Tiles,
    own: Extent,
    heads: int,
    moving: dict[str, Extent],
    own_tensors: tuple[str, ...],
) -> Prepared:
    """A kernel whose two warpgroups have half of the own tile each."""
    box = half(own)
    return Prepared([geometry.launch(kernel, tiles, own, heads, moving | dict.fromkeys(own_tensors, box), BOX=box)])


def _query(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"key": tiles.key, "value": tiles.key}
    if tiles.is_wide:
        halved = "query", "grad_output", "grad_query"
        return _wide(geometry, query_wide_kernel, tiles, tiles.query, geometry.heads, moving, halved)
    own = "query", "grad_output", "output", "grad_query"
    return Prepared([geometry.launch(query_kernel, tiles, tiles.query, geometry.heads, moving, own)])


def _key_value(geometry: Geometry, tiles: Tiles) -> Prepared:
    moving = {"query": tiles.query, "grad_output": tiles.query}
    own = "key", "value", "grad_key", "grad_value"
    if tiles.is_wide:
        return _wide(geometry, key_value_wide_kernel, tiles, tiles.key, geometry.heads_kv, moving, own)
    return Prepared([geometry.launch(key_value_kernel, tiles, tiles.key, geometry.heads_kv, moving, own)])


def _bias(geometry: Geometry, tiles: Tiles) -> Prepared:
    axes = as_three_axes(geometry.problem.axes)
    lead = tuple(map(_lead, axes, tiles.key))
    offsets = tuple(
        ceil((query + axis.kernel_size - 1 + before) / key)
        for axis, query, key, before in zip(axes, tiles.query, tiles.key, lead, strict=True)
    )
    positions = geometry.groups * prod(geometry.tiles_per_axis(tiles.query))
    block = prod(offsets) * geometry.heads * prod(tiles.query) * prod(tiles.key)
    # Enough programs to fill any GPU a few times over, within the memory that partial sums may take.
    wanted = min(ceil(8192 / (prod(offsets) * geometry.heads)), max(1, PARTIAL_BYTES // (4 * block)))
    batch_splits = min(geometry.batch, ceil(wanted / positions))
    items = positions * batch_splits
    items_per_split = ceil(items / min(wanted, items))
    splits = ceil(items / items_per_split)
    own: dict[str, Any] = {
        "LEAD": lead,
        "OFFSETS": offsets,
        "batch_splits": batch_splits,
        "items": items,
        "items_per_split": items_per_split,
        "programs": prod(offsets) * geometry.heads * splits,
    }
    moving = {"query": tiles.query, "grad_output": tiles.query, "key": tiles.key, "value": tiles.key}
    fold = geometry.arguments | own | {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key, "splits": splits}
    rpb = geometry.problem.rpb
    assert rpb is not None
    launches = [
        geometry.launch(bias_kernel, tiles, tiles.query, geometry.heads, moving, **own),
        Launch(bias_fold_kernel, prod(rpb.shape), fold | {"num_warps": 1}),
    ]
    return Prepared(launches, {"partial": (splits, block)})


def _query_bias(geometry: Geometry, tiles: Tiles) -> Prepared:
    if len(geometry.problem.axes) == 3 and geometry.groups == 1 and geometry.batch >= LEAST_CLIPS:
        clips = _query_bias_clips(geometry, tiles)
        if 4 * prod(clips.workspaces["partial"]) <= PARTIAL_BYTES:
            return clips
    slots, heads, rpb = geometry.slots, geometry.heads, geometry.problem.grad_rpb
    assert rpb is not None
    wanted = PROGRAMS[len(geometry.problem.axes)]
    box, samples = shares(slots, heads * geometry.groups, geometry.batch, wanted, PARTIAL_BYTES)
    along, chunks = slots.shares(box), ceil(geometry.batch / samples) * geometry.groups
    programs = chunks * heads * prod(along)
    splits = min(SPLITS, ceil(programs / (heads * slots.classes)))
    own: dict[str, Any] = {
        "before": odd(slots.before),
        "alike": odd(slots.alike),
        "box": odd(box),
        "shares": odd(along),
        "samples_per_program": samples,
        "chunks": chunks,
        "splits": splits,
        "COUNTS": slots.counts,
        "programs": programs,
    }
    moving = {"key": tiles.key, "value": tiles.key}
    read = "query", "grad_output", "output"
    rest = geometry.arguments | own | {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key, "SLOTS": slots.number}
    rest |= {"classes": odd(slots.shares(slots.alike)), "num_warps": 1}
    for name, axis in zip("thw", as_three_axes(geometry.problem.axes), strict=True):
        rest[f"length_{name}"] = axis.length // axis.dilation
    launches = [
        geometry.launch(query_bias_kernel, tiles, tiles.query, heads, moving, read, **own),
        Launch(sum_kernel, splits * heads * slots.classes * slots.number, rest),
        Launch(fold_kernel, prod(rpb.shape), rest),
    ]
    workspaces = {
        "partial": (programs, slots.number, SLOT),
        "summed": (splits, heads, slots.classes, slots.number, SLOT),
    }
    return Prepared(launches, workspaces)


def _query_bias_clips(geometry: Geometry, tiles: Tiles) -> Prepared:
    slots, heads, rpb = geometry.slots, geometry.heads, geometry.problem.grad_rpb
    assert rpb is not None
    along, chunks = slots.shares((1, 1, 1)), ceil(geometry.batch / SAMPLES)
    items = prod(along) * chunks
    share = ceil(items / max(1, CLIPS_PROGRAMS // heads))
    programs = ceil(items / share)
    rows, groups = programs + slots.classes - 1, (slots.counts[0] + 2) * 2
    own: dict[str, Any] = {
        "before": odd(slots.before),
        "alike": odd(slots.alike),
        "places": odd(along),
        "chunks": chunks,
        "items": items,
        "share": share,
        "rows": rows,
        "COUNTS": slots.counts,
        "programs": programs * heads,
        "num_warps": SAMPLES,
    }
    read = {"query": tiles.query, "key": tiles.key, "value": tiles.key}
    read |= {"grad_output": tiles.query, "output": tiles.query}
    rest = geometry.arguments | own | {"QUERY_TILE": tiles.query, "KEY_TILE": tiles.key}
    rest |= {"POSITIONS_AT_ONCE": 16, "num_warps": 8}
    launches = [
        geometry.launch(query_bias_clips_kernel, tiles, tiles.query, heads, read, samples=SAMPLES, **own),
        Launch(fold_rows_kernel, heads * ceil(prod(rpb.shape[1:]) / 16), rest),
    ]
    return Prepared(launches, {"partial": (heads, rows, *slots.counts[1:], groups, SLOT)})


@lru_cache(maxsize=4096)
def _fuses_bias(problem: Problem) -> bool:
    return Geometry(problem).fuses_bias


def _lead(axis: Axis, key_tile: int) -> int:
    """How far before a query tile its key tiles start: by whole tiles before the windows away from the borders, so
    that these meet as few tiles as can be, and far enough for the windows at the end of the axis.
    """
    k, s = axis.kernel_size, axis.stride
    inner = k - s if axis.is_causal else k // 2 - s // 2
    return inner + ceil(max(0, k - 1 - inner) / key_tile) * key_tile


PREPARE: dict[str, Callable[[Geometry, Tiles], Prepared]] = {
    "forward": _forward,
    "query": _query,
    "key_value": _key_value,
    "bias": _bias,
    "query_bias": _query_bias,
}


@lru_cache(maxsize=4096)
def _additional(problem: Problem) -> Prepared:
    """The gradients of additional keys and values, as partial sums over shares of the queries."""
    geometry = Geometry(problem)
    keys, values = problem.additional_keys, problem.additional_values
    assert keys is not None and values is not None
    width = max(geometry.head_dim, geometry.head_dim_v)
    rows = 16 if problem.query.dtype.itemsize * width > 512 else 32
    tokens = prod(axis.length for axis in problem.axes)
    programs = ceil(keys.shape[1] / rows) * geometry.heads_kv * geometry.batch
    splits = min(ceil(tokens / rows), max(1, 1024 // programs))
    arguments = geometry.arguments | {
        "tokens_per_split": ceil(tokens / splits),
        "QUERIES": rows,
        "KEYS": rows,
        "num_warps": 4,
        "num_stages": 2,
    }
    workspaces = {"partial_keys": (splits, *keys.shape), "partial_values": (splits, *values.shape)}
    return Prepared([Launch(additional_kernel, programs * splits, arguments)], workspaces)


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@lru_cache(maxsize=4096)
def _bias_copy(device: torch.device, rpb: Layout, scale: float) -> tuple[Launch, int]:
    """What copies a contiguous bias for the kernels, and how many zeros there are to be on either side of it: as far as
    kernels reach for pairs of tokens that do not attend to each other."""
    row, margin = 1, 0
    for size in reversed(rpb.shape[1:]):
        margin += row * (size + 2 * LARGEST_TILE)
        row *= size
    margin += -margin % 4  # keeps the alignment
    biases = prod(rpb.shape)
    arguments = {"scale": scale, "margin": margin, "biases": biases, "BLOCK": 1024, "num_warps": 4}
    return Launch(bias_copy_kernel, ceil((biases + 2 * margin) / 1024), arguments), margin


def unscaled(rpb: Tensor | None, scale: float) -> Tensor | None:
    """A bias as the kernels take it: float32, of scores that are yet to be scaled, and with zeros around it in memory.

    By one launch, where PyTorch takes two: beside the small kernels of small maps that shows.
    """
    if rpb is None:
        return None
    rpb = rpb.detach().contiguous()
    launch, margin = _bias_copy(rpb.device, _layout(rpb), scale)
    room = torch.empty(rpb.numel() + 2 * margin, dtype=torch.float32, device=rpb.device)
    launch({"rpb": rpb, "biases_copy": room})
    return room[margin : margin + rpb.numel()].view(rpb.shape)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Contiguous output `[B, *spatial, heads, head_dim_v]`, and float32 log-sum-exp `[B, *spatial, heads]` with heads
    outermost in memory.
    """
    query, key, value = map(_rows_contiguous, (query, key, value))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    output = query.new_empty((*query.shape[:-1], value.shape[-1]))
    batch, *spatial, heads, _ = query.shape
    lse = query.new_empty((batch, heads, *spatial), dtype=torch.float32)
    if output.numel() == 0:
        return output, lse.movedim(1, -1)
    tensors: Tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": unscaled(rpb, scale),
        "additional_keys": additional_keys,
        "additional_values": additional_values,
    }
    problem = problem_of(axes, scale, tensors)
    plan("forward", problem).run(tensors | {"output": output, "lse": lse})
    return output, lse.movedim(1, -1)


def backward(
    grad_output: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axes: tuple[Axis, ...],
    scale: float,
    rpb: Tensor | None,
    additional_keys: Tensor | None,
    additional_values: Tensor | None,
    output: Tensor,
    lse: Tensor,
    needs_rpb: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of query, key, value, rpb (where needed), and additional keys and values (where given), all
    contiguous."""
    query, key, value, grad_output = map(_rows_contiguous, (query, key, value, grad_output))
    if additional_keys is not None and additional_values is not None:
        additional_keys, additional_values = map(_rows_contiguous, (additional_keys, additional_values))
    lse = lse.movedim(-1, 1).contiguous()
    grad_lse = None if grad_lse is None else grad_lse.movedim(-1, 1).contiguous()
    grad_query, grad_key, grad_value = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)
    )
    grad_rpb = torch.empty(rpb.shape, dtype=rpb.dtype, device=rpb.device) if rpb is not None and needs_rpb else None
    if output.numel() == 0:
        optional = [None if x is None else torch.zeros_like(x) for x in (grad_rpb, additional_keys, additional_values)]
        return grad_query, grad_key, grad_value, optional[0], optional[1], optional[2]

    tensors: Tensors = {
        "query": query,
        "key": key,
        "value": value,
        "rpb": unscaled(rpb, scale),
        "additional_keys": additional_keys,
        "additional_values": additional_values,
        "grad_output": grad_output,
        "grad_lse": grad_lse,
        "output": output,
        "lse": lse,
        "grad_rpb": grad_rpb,
    }
    problem = problem_of(axes, scale, tensors)
    tensors |= {
        "delta": torch.empty_like(lse),
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
    }
    fuses_bias = _fuses_bias(problem)
    # First of all: it writes delta, which the others read.
    plan("query_bias" if fuses_bias else "query", problem).run(tensors)
    plan("key_value", problem).run(tensors)
    if grad_rpb is not None and not fuses_bias:
        plan("bias", problem).run(tensors)
    grad_keys, grad_values = None, None
    if additional_keys is not None and additional_values is not None:
        if additional_keys.numel() == 0:
            grad_keys, grad_values = torch.zeros_like(additional_keys), torch.zeros_like(additional_values)
        else:
            partial = _additional(problem).run(tensors, query.device)
            grad_keys, grad_values = (
                partial[name].sum(0).to(query.dtype)  # type: ignore[union-attr]
                for name in ("partial_keys", "partial_values")
            )
    return grad_query, grad_key, grad_value, grad_rpb, grad_keys, grad_values
