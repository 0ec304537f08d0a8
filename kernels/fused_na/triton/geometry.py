"""What the kernels of a problem have in common: their arguments, and how their tiles lie on the map."""

from fractions import Fraction
from functools import partial
from math import ceil, prod
from typing import Any

import torch
from triton.experimental.gluon._runtime import GluonJITFunction

from fused_na.triton import bulk_copy, gpu
from fused_na.triton.column_blocks import BLOCK, blocks_of
from fused_na.triton.column_classes import Classes, classes_of
from fused_na.triton.launch import Launch
from fused_na.triton.problem import Layout, Problem, contiguous
from fused_na.triton.tiles import (
    Extent,
    Tiles,
    Workload,
    always_one_tile,
    as_three_axes,
    block_width,
    can_lie_inside,
    choose_tiles,
    fits_columns,
)
from fused_na.window import group_members

PARTIAL_BYTES = 64 << 20  # memory that the partial sums of the bias gradient may take


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
        has_rpb, shared_memory = problem.rpb is not None, gpu.shared_memory(problem.device)
        self.groups = t.dilation * h.dilation * w.dilation
        read = {"query": query, "key": key, "value": value, "grad_output": problem.grad_output}
        layouts = {name: layout for name, layout in read.items() if layout is not None}
        self.output = contiguous((*query.shape[:-1], self.head_dim_v), query.dtype)
        # A tensor's last element decides whether 32-bit offsets reach within a sample; outputs are contiguous in the
        # tokens.
        additional = (problem.additional_keys, problem.additional_values)
        reach = [
            sum((n - 1) * stride for n, stride in zip(layout.shape[1:], layout.strides[1:], strict=True))
            for layout in (*layouts.values(), *additional)
            if layout is not None
        ]
        width = self.heads * max(self.head_dim, self.head_dim_v) * problem.pack
        written = prod(axis.length for axis in problem.axes) * width
        has_wide_offsets = max(*reach, written) >= 2**31
        is_hopper = (
            gpu.capability(problem.device) == 9
            and itemsize == 2
            and self.head_dim == self.head_dim_v
            and problem.additional_keys is None
            and all(map(self.can_copy_in_bulk, layouts.values()))
        )
        is_wide = is_hopper and self.head_dim == 128 and self.groups == 1 and not has_rpb
        self.workload = Workload(
            problem.axes, self.head_dim, self.head_dim_v, itemsize, has_rpb, shared_memory, is_wide
        )
        if is_hopper and not has_wide_offsets and (problem.output is None or self.can_copy_in_bulk(problem.output)):
            self.workload = self.workload._replace(has_columns=fits_columns(self.workload))
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
            "PACK": problem.pack,
            "DILATED": self.groups > 1,
            "WIDE": has_wide_offsets,
            "PRECISION": "tf32" if query.dtype == torch.float32 and problem.allow_tf32 else "ieee",
        }
        self.arguments |= {f"{name}_strides": layout.spatial_strides for name, layout in layouts.items()}
        for name, layout in zip(("additional_keys", "additional_values"), additional, strict=True):
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
        assert arguments["TMA"] or not (tiles.is_wide or tiles.is_columns)
        arguments["OWN_TMA"] = arguments["TMA"] and len(copied) > len(moving)
        bulk = {}
        if arguments["TMA"]:
            describe = bulk_copy.describe_for_gluon if isinstance(kernel, GluonJITFunction) else bulk_copy.describe
            axes = as_three_axes(self.problem.axes)
            bulk = {name: partial(describe, layout, axes, copied[name]) for name, layout in layouts.items()}
        return Launch(kernel, arguments.pop("programs"), arguments, bulk)

    def layout(self, name: str) -> Layout:
        """How a tensor lies in memory: as it was given, or if a kernel writes it as `contiguous` says."""
        given = getattr(self.problem, name, None)
        if given is not None:
            return given
        if name == "output":
            return self.output
        of = getattr(self.problem, name.removeprefix("grad_"))
        return contiguous(of.shape, of.dtype, self.problem.pack)

    def can_copy_in_bulk(self, layout: Layout) -> bool:
        """Whether tiles of a tensor can be loaded by Hopper's bulk copy engine."""
        return gpu.capability(self.problem.device) >= 9 and bulk_copy.can_copy(layout, self.problem.axes)

    @property
    def fuses_bias(self) -> bool:
        """Whether the query's and the bias's gradients come from one kernel, `query_bias_columns_kernel`, if its sums
        fit into the memory that they may take."""
        if self.problem.grad_rpb is None or self.problem.output is None or not self.workload.has_columns:
            return False
        tiles = choose_tiles("query_bias", self.workload)
        classes = self.classes(tiles)
        blocks = blocks_of(as_three_axes(self.problem.axes)[0], tiles.query[0] // BLOCK, True)
        sums = self.heads * classes.number * prod(classes.counts) * (2 * blocks.span + 1) * 64 * 4
        return sums <= PARTIAL_BYTES

    def classes(self, tiles: Tiles) -> Classes:
        """Of the kernel that `fuses_bias` names, in each dilation group, which have one size."""
        axes = tuple(axis._replace(length=axis.length // axis.dilation, dilation=1) for axis in self.problem.axes)
        return classes_of(axes, tiles.query, tiles.key)

    def has_interior(self, tiles: Tiles) -> bool:
        """Whether a pair of tiles can lie wholly inside the neighborhood, where nothing is to be masked or added."""
        axes = as_three_axes(self.problem.axes)
        return self.problem.rpb is None and can_lie_inside(axes, tiles.query, tiles.key)

    def tiles_per_axis(self, extent: Extent) -> list[int]:
        """Tiles of the largest dilation group along each axis."""
        axes = as_three_axes(self.problem.axes)
        return [ceil(group_members(axis, 0) / size) for axis, size in zip(axes, extent, strict=True)]


def divisor(number: int) -> int:
    """A division by a number from 1 to 2**31 - 1 as a multiplication, for `neighborhood.divided`: its multiplier, from
    the eighth bit on, and a shift. It is odd, lest Triton compile anew for values that are divisible by 16.
    """
    shift = (number - 1).bit_length()
    return ceil(Fraction(1 << 31 + shift, number)) << 8 | shift << 1 | 1
