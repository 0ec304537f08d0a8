"""What the kernels for large windows on Hopper share, in Gluon: one warp copies tiles, two warpgroups work on them.

A program's own tile is two boxes of 64 rows side by side, one for each warpgroup. A producer warp goes through the
tiles that the own tile meets and copies them into a ring of stages in shared memory, a stage a step.

Barriers. A wait for parity `p` returns once the current phase is not of parity `p`: phases count from 0, so on a new
barrier a wait for parity 1 is over at once. Nobody is ever two phases behind a barrier.
- `full[s]`: step `i` is phase `i // STAGES` of stage `i % STAGES`; its readers wait for parity `i // STAGES % 2`, in
  order. The producer arrives, with the bytes of its copies.
- `empty[s]`, two arrivals a phase, the warpgroups': step `i` may be filled once phase `i // STAGES - 1` is over, that
  is when both are done with step `i - STAGES`; parity `(i // STAGES + 1) % 2`, over at once in the first round.

The backward kernels start the last product of a step, of the gradients of its scores with the tile that was copied, in
the next step, so that a warpgroup has products in flight while it works on the softmax. It therefore releases step
`i - 1` at the end of step `i`, after a wait for step `i + 1`, which takes three stages.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma

from fused_na.triton.neighborhood import clamped, divided, inverse_windows, locate, windows
from fused_na.triton.walk import NEVER, first_tile, interior, part

LOG2_E = gl.constexpr(1.4426950408889634)
REGISTERS = gl.constexpr((240, 24))  # of a thread of the warpgroups, and of the producer


@gluon.jit
def place_of(lengths, heads, divisors, OWN_TILE: gl.constexpr):
    """Batch, head and first token of the program's own tile."""
    rest, _, _, begin = locate(gl.program_id(0), lengths, (1, 1, 1), divisors, OWN_TILE, False)
    batch = divided(rest, divisors[6])
    return batch, rest - batch * heads, begin


@gluon.jit
def walks(
    begin,
    lengths,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    OWN_TILE: gl.constexpr,
    TILE: gl.constexpr,
    INTERIOR: gl.constexpr,
    INVERSE: gl.constexpr,
):
    """Walks through the key tiles of a program's queries, or with `INVERSE` the query tiles of its keys: first those
    that need masks and then those inside all windows, with their numbers of steps, and the first tile of all."""
    last = clamped(begin, (OWN_TILE[0] - 1, OWN_TILE[1] - 1, OWN_TILE[2] - 1), lengths)
    if INVERSE:
        first, first_end = inverse_windows(begin, lengths, KERNEL, STRIDE, CAUSAL)
        last_start, stop = inverse_windows(last, lengths, KERNEL, STRIDE, CAUSAL)
    else:
        first, first_end = windows(begin, lengths, KERNEL, STRIDE, CAUSAL)
        last_start, stop = windows(last, lengths, KERNEL, STRIDE, CAUSAL)
    inner_begin, inner_end = interior(first, first_end, last_start, TILE)
    outer, outer_steps = part(first, stop, inner_begin, inner_end, TILE, NEVER, False, INTERIOR)
    inner, inner_steps = part(first, stop, inner_begin, inner_end, TILE, NEVER, True, True)
    if not INTERIOR:
        inner_steps = outer_steps * 0
    t, h, w = first_tile(outer)
    is_outer = outer_steps > 0
    tile = gl.where(is_outer, t, first[0]), gl.where(is_outer, h, first[1]), gl.where(is_outer, w, first[2])
    return outer, outer_steps, inner, inner_steps, tile


@gluon.jit
def box_begin(begin, index, OWN_TILE: gl.constexpr, BOX: gl.constexpr):
    """First token of a warpgroup's box."""
    t: gl.constexpr = BOX[0] if OWN_TILE[0] > BOX[0] else 0
    h: gl.constexpr = BOX[1] if OWN_TILE[1] > BOX[1] else 0
    w: gl.constexpr = BOX[2] if OWN_TILE[2] > BOX[2] else 0
    return begin[0] + index * t, begin[1] + index * h, begin[2] + index * w


@gluon.jit
def wait_empty(full, empty, step, bytes, STAGES: gl.constexpr):
    """Waits until a step's stage may be filled, and announces what will be; returns the stage."""
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), (step // STAGES + 1) % 2)
    mbarrier.expect(full.index(stage), bytes)
    return stage


@gluon.jit
def wait_full(full, step, STAGES: gl.constexpr):
    """Waits for what a step reads."""
    mbarrier.wait(full.index(step % STAGES), step // STAGES % 2)


@gluon.jit
def copy_tile(tensor, buffers, full, stage, batch, tile, head):
    """Starts the copy of a tile of one head into a stage."""
    place = [batch, tile[0], tile[1], tile[2], head * tensor.block_type.shape[4]]
    tma.async_copy_global_to_shared(tensor, place, full.index(stage), buffers.index(stage))


@gluon.jit
def packed(x, dtype: gl.constexpr):
    """Rounded numbers, two to an int32: half as many registers from one step to the next."""
    name: gl.constexpr = "bf16x2" if dtype == gl.bfloat16 else "f16x2"
    even, odd = gl.split(x.reshape([x.shape[0], x.shape[1] // 2, 2]))
    return gl.inline_asm_elementwise(
        "cvt.rn." + name + ".f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr):
    """The inverse of `packed`."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    both = gl.join(even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True))
    return both.reshape([pairs.shape[0], pairs.shape[1] * 2])


@gluon.jit
def matrix(buffers, index, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """A tile or box in shared memory as a matrix."""
    return buffers.index(index).reshape([ROWS, COLUMNS])


@gluon.jit
def add_product(pairs, right, accumulator):
    """Starts the product of packed numbers with a matrix in shared memory."""
    operand: gl.constexpr = gl.DotOperandLayout(0, accumulator.type.layout, 2)
    left = gl.convert_layout(unpacked(pairs, right.dtype), operand, assert_trivial=True)
    return warpgroup_mma(left, right, accumulator, is_async=True)


@gluon.jit
def store_box(descriptor, result, buffers, index, batch, box, head):
    """Starts the copy of a warpgroup's result to memory, through a place in shared memory that it alone has read."""
    matrix(buffers, index, result.shape[0], result.shape[1]).store(result.to(descriptor.dtype))
    fence_async_shared()
    place = [batch, box[0], box[1], box[2], head * result.shape[1]]
    tma.async_copy_shared_to_global(descriptor, place, buffers.index(index))
