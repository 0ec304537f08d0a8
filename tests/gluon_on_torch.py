"""Kernels on PyTorch's tensors, without a GPU: Triton's interpreter does not know Gluon.

A kernel runs as the Python function that it is written as, in which the names of Triton's and Gluon's languages stand
for what is here. Programs run one after the other, and layouts mean nothing.

What a GPU does at a time of its own happens when a mistake shows:
- Shared memory is NaN at first. A bulk copy makes its target NaN when it starts and arrives when it is waited for, one
  to memory only then.
- A product of warpgroups is computed when it starts and has no value before it is waited for. Until then its operands
  in shared memory must stay as they are.
- The partitions of a program are threads of which one has the turn. After an arrival at a barrier the others come
  first, each up to its next arrival or to a wait that holds it up.

Errors are also accesses outside of a tensor's memory, waits that would not end, arrivals at a barrier that belong to a
later phase, and copies and products that nobody waits for. What threads of one partition do to each other stays unseen,
and so do fences, the bits of integers and the precision of matrix units.
"""

import dis
import operator
from collections.abc import Callable
from functools import cache, partial
from math import prod
from threading import Condition, Thread
from types import FunctionType, SimpleNamespace
from typing import Any, ClassVar

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from fused_na.triton.launch import Launch
from fused_na.triton.problem import Tensors


class Value(Tensor):
    """A tensor of a program, of no dimension for a number, with Triton's operators where they are not PyTorch's."""

    type = SimpleNamespace(layout=None)

    # Division rounds towards zero.
    def __floordiv__(self, other: Any) -> Tensor:
        return torch.div(self, other, rounding_mode="trunc")

    def __rfloordiv__(self, other: Any) -> Tensor:
        return torch.div(value(other), self, rounding_mode="trunc")

    def __mod__(self, other: Any) -> Tensor:
        return torch.fmod(self, other)

    def __rmod__(self, other: Any) -> Tensor:
        return torch.fmod(value(other), self)

    # `x += y` leaves the old value to other names for it.
    __iadd__, __isub__, __imul__ = Tensor.__add__, Tensor.__sub__, Tensor.__mul__
    __iand__, __ior__, __ixor__ = Tensor.__and__, Tensor.__or__, Tensor.__xor__

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        if dtype == torch.uint32:  # which PyTorch does not compare
            return self.long() & 0xFFFFFFFF
        assert not bitcast
        return super().to(dtype)


def value(x: Any) -> Tensor:
    """A tensor or a number of Python's as a program has it."""
    return torch.as_tensor(x).as_subclass(Value)


class Pointer:
    """Pointers to the elements of a tensor's memory at `offset`."""

    def __init__(self, memory: Tensor, offset: Any) -> None:
        self.memory, self.offset = memory, value(offset)
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Pointer":
        return Pointer(self.memory, self.offset - other)

    def __getitem__(self, index: Any) -> "Pointer":
        return Pointer(self.memory, self.offset[index])

    def places(self, mask: Any) -> tuple[Tensor, Tensor]:
        """Offsets and mask of one shape, of which all that are not masked lie in the memory."""
        offset, mask = torch.broadcast_tensors(self.offset, value(mask))
        assert not (mask & ((offset < 0) | (offset >= len(self.memory)))).any(), "an access outside of a tensor"
        return offset, mask


def pointer_to(x: Tensor) -> Pointer:
    """A kernel's argument for a tensor, be it a view."""
    x = x.detach()
    return Pointer(x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0), x.storage_offset())


def load(pointer: Pointer, mask: Any = True, other: float = float("nan"), eviction_policy: str = "") -> Tensor:
    offset, mask = pointer.places(mask)
    loaded = pointer.memory[torch.where(mask, offset, 0)].as_subclass(Value)
    return loaded if mask.all() else torch.where(mask, loaded, torch.tensor(other, dtype=loaded.dtype))


def store(pointer: Pointer, stored: Any, mask: Any = True) -> None:
    offset, mask = pointer.places(mask)
    pointer.memory[offset[mask]] = value(stored).expand(offset.shape)[mask].to(pointer.memory.dtype)


class Descriptor:
    """A tensor of which tiles are copied, from what describes it to a GPU."""

    def __init__(self, described: Any) -> None:
        self.base, self.sizes, self.strides = pointer_to(described.base), described.shape, described.strides
        self.dtype, self.layout = described.base.dtype, None
        block = list(described.block_shape)
        self.block_type = SimpleNamespace(shape=block, nbytes=prod(block) * self.dtype.itemsize)

    def tile(self, place: list) -> tuple[Pointer, Tensor]:
        """Pointers to the tile at `place`, and whether they lie inside the tensor."""
        offset, inside = torch.tensor(0), torch.tensor(True)
        for begin, n, size, stride in zip(place, self.block_type.shape, self.sizes, self.strides, strict=True):
            index = int(begin) + torch.arange(n)
            offset = offset[..., None] + index * stride
            inside = inside[..., None] & (index >= 0) & (index < size)
        return self.base + offset, inside

    def load(self, place: list) -> Tensor:
        return load(*self.tile(place), other=0.0)

    def store(self, place: list, stored: Tensor) -> None:
        pointer, inside = self.tile(place)
        store(pointer, stored.view(inside.shape), inside)


class Shared:
    """Shared memory."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.shape, self.dtype = x, list(x.shape), x.dtype

    def index(self, i: Any) -> "Shared":
        assert 0 <= i < len(self.x), "no such place in shared memory"
        return Shared(self.x[int(i)])

    def slice(self, start: int, length: int) -> "Shared":
        return Shared(self.x[start : start + length])

    def reshape(self, shape: Any) -> "Shared":
        return Shared(self.x.view(shape))

    def permute(self, order: Any) -> "Shared":
        return Shared(self.x.permute(order))

    def load(self, layout: Any) -> Tensor:
        return value(self.x.clone())

    def store(self, stored: Tensor) -> None:
        assert self.x.shape == stored.shape
        self.x.copy_(stored)


class Barrier:
    """A barrier, whose phases count from 0."""

    def __init__(self) -> None:
        self.count = self.missing = 0  # arrivals of a phase, and those that are still to come
        self.bytes = 0  # that are expected and have not been copied
        self.copies: list[tuple[Callable[[], None], int]] = []  # under way, with their bytes
        self.phase = 0

    def init(self, count: int) -> None:
        self.count = self.missing = count

    def arrive(self, bytes: int = 0) -> None:
        assert self.missing > 0, "an arrival of a later phase"
        self.missing, self.bytes = self.missing - 1, self.bytes + bytes
        self.end_phase()

    def end_phase(self) -> None:
        """Ends the phase if all has come."""
        if self.missing == self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def is_past(self, parity: int) -> bool:
        """Whether the current phase is not of this parity, once its copies have arrived."""
        while self.phase % 2 == parity and self.copies:
            copy, bytes = self.copies.pop(0)
            copy()
            self.bytes -= bytes
            assert self.bytes >= 0, "more bytes than are expected"
            self.end_phase()
        return self.phase % 2 != parity


class Barriers:
    """Barriers in shared memory."""

    def __init__(self, number: int) -> None:
        self.barriers = [Barrier() for _ in range(number)]

    def index(self, i: Any) -> Barrier:
        assert 0 <= i < len(self.barriers), "no such barrier"
        return self.barriers[int(i)]


class Product:
    """A product of a warpgroup that may be under way, of which no kernel knows the result."""

    def __init__(self, left: Any, right: Shared, accumulator: Tensor, use_acc: bool) -> None:
        self.operands = [(x, x.load(None)) for x in (left, right) if isinstance(x, Shared)]
        values = [x.load(None) if isinstance(x, Shared) else x for x in (left, right)]
        self.result = dot(*values, accumulator if use_acc else None)

    def finish(self) -> None:
        # NaN, what has not been copied, is not equal to itself.
        assert all(torch.equal(x.x, before) for x, before in self.operands), "a product of what is not there"


class Partition:
    """A part of a program that runs beside the others."""

    def __init__(self, run: Callable[[], None]) -> None:
        self.run = run
        self.can_go_on: Callable[[], bool] = lambda: True
        self.products: list[Product] = []  # under way
        self.stores: list[Callable[[], None]] = []  # copies from shared memory, likewise


class Program:
    """A program, or what `warp_specialize` starts in one: partitions, which pass on the turn at barriers.

    Args:
        index: its number among the programs of a kernel.
        functions: what its partitions run.
        barriers: all that it has made so far.
    """

    current: ClassVar["Program"]

    def __init__(self, index: int, functions: list[Callable[[], None]], barriers: list[Barrier]) -> None:
        self.index, self.barriers = index, barriers
        self.partitions = [Partition(function) for function in functions]
        self.turn: int | None = 0  # whose it is; nobody's once no partition can go on
        self.turn_passes = Condition()
        self.errors: list[Exception] = []

    def run(self) -> None:
        Program.current = self
        threads = [Thread(target=self._run, args=(index,)) for index in range(len(self.partitions))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]
        assert not any(x.products or x.stores for x in self.partitions), "nobody waits for a product or a copy"
        assert not any(x.bytes or x.copies for x in self.barriers), "nobody waits for a copy"

    def _run(self, index: int) -> None:
        """A partition's thread."""
        with self.turn_passes:
            try:
                self._wait(index)
                self.partitions[index].run()
                self._pass_on(index, lambda: False)
            except Exception as error:
                self.errors.append(error)
                self.turn = None
                self.turn_passes.notify_all()

    def _pass_on(self, index: int, can_go_on: Callable[[], bool]) -> None:
        """Gives the turn to the next partition after `index` that can go on."""
        self.partitions[index].can_go_on = can_go_on
        order = [*range(index + 1, len(self.partitions)), *range(index + 1)]
        self.turn = next((i for i in order if self.partitions[i].can_go_on()), None)
        self.turn_passes.notify_all()

    def _wait(self, index: int) -> None:
        self.turn_passes.wait_for(lambda: self.turn in (index, None))
        assert self.turn == index, "a wait that does not end"

    @property
    def partition(self) -> Partition:
        """That which has the turn."""
        assert self.turn is not None
        return self.partitions[self.turn]

    def let_others(self, can_go_on: Callable[[], bool] = lambda: True) -> None:
        """Gives the others the turn, and comes back when this partition can go on."""
        assert self.turn is not None
        index = self.turn
        self._pass_on(index, can_go_on)
        self._wait(index)


def specialize(functions: list[tuple[Callable, tuple]], warps: list[int], registers: list[int]) -> None:
    outer = Program.current
    Program(outer.index, [partial(function, *arguments) for function, arguments in functions], outer.barriers).run()
    Program.current = outer


def allocate(dtype: torch.dtype, shape: list[int], layout: Any) -> Shared | Barriers:
    if layout == "barrier":
        barriers = Barriers(shape[0])
        Program.current.barriers += barriers.barriers
        return barriers
    return Shared(torch.full(shape, float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min, dtype=dtype))


def expect(barrier: Barrier, bytes: int, pred: Any = True) -> None:
    if pred:
        barrier.arrive(bytes)


def arrive(barrier: Barrier) -> None:
    barrier.arrive()
    Program.current.let_others()


def wait(barrier: Barrier, parity: Any) -> None:
    if not barrier.is_past(int(parity)):
        Program.current.let_others(partial(barrier.is_past, int(parity)))


def copy_to_shared(descriptor: Descriptor, place: list, barrier: Barrier, target: Shared, pred: Any = True) -> None:
    def copy() -> None:
        target.store(descriptor.load(place).view(target.x.shape))

    if pred:
        target.x.fill_(float("nan"))
        barrier.copies.append((copy, descriptor.block_type.nbytes))


def copy_from_shared(descriptor: Descriptor, place: list, source: Shared) -> None:
    Program.current.partition.stores.append(lambda: descriptor.store(place, source.load(None)))


def wait_for_stores(under_way: int) -> None:
    stores = Program.current.partition.stores
    while len(stores) > under_way:
        stores.pop(0)()


def multiply(left: Any, right: Shared, accumulator: Tensor, use_acc: bool = True, is_async: bool = False) -> Product:
    assert is_async
    product = Product(left, right, accumulator, use_acc)
    Program.current.partition.products.append(product)
    return product


def wait_for_products(under_way: int, deps: list) -> Any:
    products = Program.current.partition.products
    while len(products) > under_way:
        products.pop(0).finish()
    results = [x.result if isinstance(x, Product) and x not in products else x for x in deps]
    return results[0] if len(deps) == 1 else results


def dot(left: Tensor, right: Tensor, accumulator: Tensor | None = None, input_precision: str | None = None) -> Tensor:
    product = left.float() @ right.float()
    return product if accumulator is None else product + accumulator


def load_pair(first: Pointer, second: Pointer, rows: Tensor, mask: Tensor, ALL: bool) -> tuple[Tensor, Tensor]:
    loaded = (load(pointer + rows, ALL or mask, 0.0) for pointer in (first, second))
    return next(loaded), next(loaded)


def check(condition: Any) -> None:
    assert condition


def nothing(*_: Any, **__: Any) -> None:
    """Stands for layouts, and for instructions that matter to the hardware alone."""


DTYPES = ("bfloat16", "float16", "float32", "uint32", "int32", "int64")
LANGUAGE = SimpleNamespace(
    **{name: getattr(torch, name) for name in DTYPES},
    **dict.fromkeys(("NVMMADistributedLayout", "DotOperandLayout", "SliceLayout", "BlockedLayout"), nothing),
    SwizzledSharedLayout=nothing,
    num_warps=nothing,
    static_assert=check,
    static_range=range,
    range=lambda *bounds, num_stages: range(*bounds),
    tuple=tuple,
    program_id=lambda axis: value(Program.current.index),
    allocate_shared_memory=allocate,
    warp_specialize=specialize,
    load=load,
    store=store,
    arange=lambda begin, end, layout=None: value(torch.arange(begin, end)),
    full=lambda shape, x, dtype, layout=None: value(torch.full(shape, x, dtype=dtype)),
    zeros=lambda shape, dtype, layout=None: value(torch.zeros(shape, dtype=dtype)),
    zeros_like=torch.zeros_like,
    cast=lambda x, dtype: value(x).to(dtype),
    convert_layout=lambda x, layout, assert_trivial=False: x,
    broadcast_to=torch.broadcast_to,
    join=lambda x, y: torch.stack(torch.broadcast_tensors(x, y), -1),
    split=lambda x: x.unbind(-1),
    where=lambda condition, x, y: torch.where(value(condition), value(x), value(y)),
    minimum=lambda x, y: torch.minimum(value(x), value(y)),
    maximum=lambda x, y: torch.maximum(value(x), value(y)),
    cdiv=lambda x, y: (x + y - 1) // y,
    max=lambda x, axis: x.amax(axis),
    sum=lambda x, axis: x.sum(axis),
    umulhi=lambda x, y: x * y >> 32,
    exp2=torch.exp2,
    log2=torch.log2,
    math=SimpleNamespace(div_rn=operator.truediv),
    dot=dot,
)
STAND_INS = {
    "gl": LANGUAGE,
    "tl": LANGUAGE,
    "mbarrier": SimpleNamespace(
        MBarrierLayout=lambda: "barrier", init=Barrier.init, expect=expect, arrive=arrive, wait=wait
    ),
    "tma": SimpleNamespace(
        async_copy_global_to_shared=copy_to_shared,
        async_copy_shared_to_global=copy_from_shared,
        store_wait=wait_for_stores,
    ),
    "mma_v2": dot,
    "warpgroup_mma": multiply,
    "warpgroup_mma_wait": wait_for_products,
    **dict.fromkeys(("fence_async_shared", "gdc_wait", "gdc_launch_dependents"), nothing),
    # Kernels' own, and their functions in assembly or with more of Triton than there is here.
    "INTERPRETED": True,
    "load_row_pair": load_pair,
    "load_sums": partial(load, other=0.0),
    "store_sums": store,
    "packed": lambda x, dtype: x.to(dtype),
    "unpacked": lambda pairs, dtype: pairs,
    "packed_product": lambda pairs, x, dtype: (pairs.float() * x).to(dtype),
}


def stand_in(name: str, x: Any) -> Any:
    """What a kernel's module calls `name`, for kernels on PyTorch's tensors."""
    if name in STAND_INS:
        return STAND_INS[name]
    if isinstance(x, JITFunction):
        return on_torch(x)
    return x.value if isinstance(x, tl.constexpr) else x


@cache
def on_torch(kernel: JITFunction) -> Callable:
    """A kernel, or a function that kernels call, as one that takes `Value`s."""
    function = kernel.fn
    used = {x.argval for x in dis.get_instructions(function) if x.opname == "LOAD_GLOBAL"}
    names = {name: stand_in(name, x) for name, x in function.__globals__.items() if name in used}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__)


def launch(self: Launch, tensors: Tensors) -> None:
    """In place of `Launch.__call__`: runs all programs."""
    arguments = self.arguments | {name: tensors[name] for name in self.tensors}
    for parameter in self.kernel.params:
        name, x = parameter.name, arguments[parameter.name]
        if name in self.bulk:
            arguments[name] = Descriptor(self.bulk[name](x))
        elif isinstance(x, Tensor):
            arguments[name] = pointer_to(x)
        elif not parameter.is_constexpr and x is not None:
            arguments[name] = tuple(map(value, x)) if isinstance(x, tuple) else value(x)
    kernel = partial(on_torch(self.kernel), **{name: arguments[name] for name in self.kernel.arg_names})
    for index in range(self.grid[0]):
        Program(index, [kernel], []).run()
