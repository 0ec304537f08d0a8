"""What the kernels share: where a tile lies, which keys its queries see, and where tokens are in memory.

Every problem is treated as three-dimensional, `(t, h, w)`; missing axes have length 1. `fused_na.window` defines the
rule; `window` and `inverse_window` here are the same functions on Triton tensors, and a test holds them equal. Counts
are in members of a dilation group, so that inside a kernel nothing is dilated but the strides.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def window(index, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Keys `[start, end)` of in-group query indices."""
    if CAUSAL:
        leader = tl.minimum(index // STRIDE * STRIDE + STRIDE - 1, members - 1)
        start = tl.maximum(leader - KERNEL + 1, 0)
        end = index + 1
    else:
        leader = tl.minimum(index // STRIDE * STRIDE + STRIDE // 2, members - 1)
        start = tl.minimum(tl.maximum(leader - KERNEL // 2, 0), members - KERNEL)
        end = start + KERNEL
    return start, end


@triton.jit
def inverse_window(index, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Queries `[first, end)` of in-group key indices."""
    if CAUSAL:
        first = index
        last = (index + KERNEL - STRIDE) // STRIDE * STRIDE + STRIDE
        end = tl.where(index + KERNEL >= members, members, tl.minimum(last, members))
    else:
        reach = index - KERNEL + 1 + KERNEL // 2 - STRIDE // 2
        first = tl.where(index < KERNEL, 0, (reach + STRIDE - 1) // STRIDE * STRIDE)
        last = (index + KERNEL // 2 - STRIDE // 2) // STRIDE * STRIDE + STRIDE
        end = tl.where(index >= members - KERNEL, members, tl.minimum(last, members))
    return first, end


@triton.jit
def divided(number, divisor):
    """`number // n` for `0 <= number < 2**31`, by what `geometry.divisor` makes of `n`: 3 instructions, not 30."""
    multiplier, shift = (divisor >> 8).to(tl.uint32), ((divisor >> 1) & 31).to(tl.uint32)
    return (tl.umulhi(tl.cast(number, tl.uint32) << 1, multiplier) >> shift).to(tl.int32)


@triton.jit
def members_of(group, length, dilation_divisor, DILATED: tl.constexpr):
    """Members of a dilation group of an axis."""
    if DILATED:
        return divided(length - group - 1, dilation_divisor) + 1
    return length - group


@triton.jit
def locate(pid, lengths, dilations, divisors, TILE: tl.constexpr, DILATED: tl.constexpr):
    """Splits a program id into a tile of a dilation group and what is left (heads and batch).

    `divisors` are of the tiles and of the dilation of each axis. Returns `(rest, group, members, begin)`; the last
    three hold one value per axis, `begin` the tile's first member. In the smaller groups of an axis that its dilation
    does not divide, a last tile may lie outside: `begin >= members`.
    """
    tiles_t = tl.cdiv(members_of(0, lengths[0], divisors[3], DILATED), TILE[0])
    tiles_h = tl.cdiv(members_of(0, lengths[1], divisors[4], DILATED), TILE[1])
    tiles_w = tl.cdiv(members_of(0, lengths[2], divisors[5], DILATED), TILE[2])
    rest = divided(pid, divisors[2])
    begin_w = (pid - rest * tiles_w) * TILE[2]
    pid, rest = rest, divided(rest, divisors[1])
    begin_h = (pid - rest * tiles_h) * TILE[1]
    pid, rest = rest, divided(rest, divisors[0])
    begin_t = (pid - rest * tiles_t) * TILE[0]
    group = (0, 0, 0)
    if DILATED:
        pid, rest = rest, divided(rest, divisors[5])
        group_w = pid - rest * dilations[2]
        pid, rest = rest, divided(rest, divisors[4])
        group_h = pid - rest * dilations[1]
        pid, rest = rest, divided(rest, divisors[3])
        group = pid - rest * dilations[0], group_h, group_w
    members_t = members_of(group[0], lengths[0], divisors[3], DILATED)
    members_h = members_of(group[1], lengths[1], divisors[4], DILATED)
    members_w = members_of(group[2], lengths[2], divisors[5], DILATED)
    return rest, group, (members_t, members_h, members_w), (begin_t, begin_h, begin_w)


@triton.jit
def unravel(index, TILE: tl.constexpr):
    """Coordinates `(t, h, w)` within a tile of the tile's rows."""
    return index // (TILE[1] * TILE[2]), index // TILE[2] % TILE[1], index % TILE[2]


@triton.jit
def offset(coordinate, strides, WIDE: tl.constexpr):
    """Elements from a tensor's start to coordinates `(t, h, w)`; `strides` are those of the three axes."""
    t, h, w = coordinate
    if WIDE:
        t, h, w = t.to(tl.int64), h.to(tl.int64), w.to(tl.int64)
    return t * strides[0] + h * strides[1] + w * strides[2]


@triton.jit
def head_of(tensor, batch, head, batch_stride, head_stride, WIDE: tl.constexpr):
    """Where a head of a sample starts in memory; `batch` is 64-bit."""
    if WIDE:
        head = tl.cast(head, tl.int64)
    return tensor + batch * batch_stride + head * head_stride


@triton.jit
def dilated(group, member, dilations):
    """Coordinates of members of a dilation group."""
    return (
        member[0] * dilations[0] + group[0],
        member[1] * dilations[1] + group[1],
        member[2] * dilations[2] + group[2],
    )


@triton.jit
def windows(member, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """`window` on each axis: `(start_t, start_h, start_w), (end_t, end_h, end_w)`."""
    start_t, end_t = window(member[0], members[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    start_h, end_h = window(member[1], members[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    start_w, end_w = window(member[2], members[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (start_t, start_h, start_w), (end_t, end_h, end_w)


@triton.jit
def inverse_windows(member, members, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """`inverse_window` on each axis."""
    first_t, end_t = inverse_window(member[0], members[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    first_h, end_h = inverse_window(member[1], members[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    first_w, end_w = inverse_window(member[2], members[2], KERNEL[2], STRIDE[2], CAUSAL[2])
    return (first_t, first_h, first_w), (end_t, end_h, end_w)


@triton.jit
def clamped(begin, inner, members):
    """Members of a tile's rows, those beyond the group replaced by its last one."""
    return (
        tl.minimum(begin[0] + inner[0], members[0] - 1),
        tl.minimum(begin[1] + inner[1], members[1] - 1),
        tl.minimum(begin[2] + inner[2], members[2] - 1),
    )


@triton.jit
def below(begin, inner, end):
    """Whether a tile's rows lie before `end` on every axis."""
    return (begin[0] + inner[0] < end[0]) & (begin[1] + inner[1] < end[1]) & (begin[2] + inner[2] < end[2])


@triton.jit
def mask_on_axis(row_start, row_end, column):
    """As `mask`, on one axis."""
    # start <= x < end in one unsigned comparison.
    width = (row_end - row_start).to(tl.uint32, bitcast=True)
    inside = (column[None, :] - row_start[:, None]).to(tl.uint32, bitcast=True) < width[:, None]
    return tl.where(inside, 0.0, float("-inf"))


@triton.jit
def mask(row_start, row_end, begin, inner, ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, biases=None):
    """What to add to scores: 0 where a column (member `begin + inner`) lies in a row's interval on every axis, -inf
    elsewhere: `[rows, columns]`. With `biases`, also `[rows, columns]`, these in place of 0.

    A sum over axes, since additions run at twice the rate of selections and few of an axis's masks differ. Nor do many
    biases, but only for pairs at the same distance along t, so that its mask comes last.
    """
    total = mask_on_axis(row_start[2], row_end[2], begin[2] + inner[2])
    if ROW_TILE[1] * COLUMN_TILE[1] > 1:
        total += mask_on_axis(row_start[1], row_end[1], begin[1] + inner[1])
    if biases is not None:
        total += biases
    if ROW_TILE[0] * COLUMN_TILE[0] > 1:
        total += mask_on_axis(row_start[0], row_end[0], begin[0] + inner[0])
    return total


@triton.jit
def is_unshifted_on_axis(
    begin, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr
):
    shift: tl.constexpr = STRIDE - 1 if CAUSAL else STRIDE // 2
    before: tl.constexpr = KERNEL - 1 if CAUSAL else KERNEL // 2
    last_leader = (begin + TILE - 1) // STRIDE * STRIDE + shift
    return (begin % STRIDE == 0) & (begin + shift >= before) & (last_leader + KERNEL - 1 - before < members)


@triton.jit
def is_unshifted(begin, members, TILE: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, CAUSAL: tl.constexpr):
    """Whether a tile's queries and windows lie relative to each other as in any other tile of which this is true: it is
    whole, starts where a stride does, and no border shifts a window."""
    t = is_unshifted_on_axis(begin[0], members[0], TILE[0], KERNEL[0], STRIDE[0], CAUSAL[0])
    h = is_unshifted_on_axis(begin[1], members[1], TILE[1], KERNEL[1], STRIDE[1], CAUSAL[1])
    return t & h & is_unshifted_on_axis(begin[2], members[2], TILE[2], KERNEL[2], STRIDE[2], CAUSAL[2])


@triton.jit
def bias_position(member, KERNEL: tl.constexpr):
    """A member's share of the index into the flattened relative positional bias: key's minus query's, plus
    `bias_center`."""
    return (member[0] * (2 * KERNEL[1] - 1) + member[1]) * (2 * KERNEL[2] - 1) + member[2]


@triton.jit
def bias_center(KERNEL: tl.constexpr):
    """Index of a token's bias for itself."""
    return ((KERNEL[0] - 1) * (2 * KERNEL[1] - 1) + KERNEL[1] - 1) * (2 * KERNEL[2] - 1) + KERNEL[2] - 1


@triton.jit
def load_biases(base, ROW_TILE: tl.constexpr, COLUMN_TILE: tl.constexpr, KERNEL: tl.constexpr, SIGN: tl.constexpr):
    """Loads one bias for each pair of tokens of two tiles, `[rows, columns]`, also for pairs that do not attend to each
    other or lie outside the map: around the biases is room (`attention.unscaled`).

    `base` points to the bias of the tiles' first tokens. `SIGN` is 1 where columns are keys, and -1 where rows are.

    In the scores' layout three bits of a row and two of a column choose the lane. Apart from the others, which are
    constants to the compiler, they leave one address and constants that the instruction holds, and pairs of a thread
    at the same distance share a load.
    """
    row = tl.arange(0, ROW_TILE[0] * ROW_TILE[1] * ROW_TILE[2])
    column = tl.arange(0, COLUMN_TILE[0] * COLUMN_TILE[1] * COLUMN_TILE[2])
    row_lane, row_rest = unravel(row & 7, ROW_TILE), unravel(row & -8, ROW_TILE)
    column_lane, column_rest = unravel(column & 6, COLUMN_TILE), unravel(column & -7, COLUMN_TILE)
    lane = bias_position(column_lane, KERNEL)[None, :] - bias_position(row_lane, KERNEL)[:, None]
    rest = bias_position(column_rest, KERNEL)[None, :] - bias_position(row_rest, KERNEL)[:, None]
    return read_only(base + SIGN * lane + SIGN * rest)


@triton.jit
def read_only(pointers):
    """Loads from memory that no thread writes, as assembly: Triton would take another layout for the loads, and a
    64-bit address for each."""
    if INTERPRETED:
        return tl.load(pointers)
    return tl.inline_asm_elementwise(
        "ld.global.nc.f32 $0, [$1];", "=f,l", [pointers.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def read_only_masked(masks, pointers):
    """As `read_only` where masks are 0, and the masks elsewhere. Unlike an addition of them it waits for no load."""
    if INTERPRETED:
        return tl.load(pointers, masks == 0, other=float("-inf"))
    return tl.inline_asm_elementwise(
        """{
        .reg .pred inside;
        setp.eq.f32 inside, $2, 0f00000000;
        mov.f32 $0, $2;
        @inside ld.global.nc.f32 $0, [$1];
        }""",
        "=f,l,f",
        [pointers.to(tl.int64), masks],
        dtype=tl.float32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def load_rows(base, rows, mask, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Loads `[rows, BLOCK]` from row offsets, zero where `mask` is false and beyond `HEAD_DIM`."""
    column = tl.arange(0, BLOCK)
    if BLOCK == HEAD_DIM:
        return tl.load(base + rows[:, None] + column[None, :], mask=mask[:, None], other=0.0)
    return tl.load(base + rows[:, None] + column[None, :], mask=mask[:, None] & (column < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(base, rows, mask, values, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Stores `[rows, BLOCK]`, the inverse of `load_rows`."""
    column = tl.arange(0, BLOCK)
    values = values.to(base.dtype.element_ty)
    if BLOCK == HEAD_DIM:
        tl.store(base + rows[:, None] + column[None, :], values, mask=mask[:, None])
    else:
        tl.store(base + rows[:, None] + column[None, :], values, mask=mask[:, None] & (column < HEAD_DIM)[None, :])


@triton.jit
def load_row_pair(first, second, rows, mask, ALL: tl.constexpr):
    """Loads `[rows]` of two vectors at once: of fewer numbers than threads, Triton has each thread load all it uses."""
    which = tl.arange(0, 2)[None, :]
    pointers = tl.where(which == 0, first, second) + rows[:, None]
    if ALL:
        pair = tl.load(pointers)
    else:
        pair = tl.load(pointers, mask=mask[:, None], other=0.0)
    return tl.split(pair)


@triton.jit
def copy_origin(batch, group, lengths, DILATED: tl.constexpr):
    """Where a dilation group of a sample starts, as descriptors count (`bulk_copy.described`): its first token among
    those of all samples, without dilation the sample."""
    origin = batch.to(tl.int32)
    if DILATED:
        origin = ((origin * lengths[0] + group[0]) * lengths[1] + group[1]) * lengths[2] + group[2]
    return origin


@triton.jit
def load_tile(descriptor, origin, begin, head, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Loads a tile `[rows, head_dim]` that starts at member `begin` through the bulk copy engine, zero outside the
    map."""
    tile = descriptor.load([origin, begin[0], begin[1], begin[2], head * HEAD_DIM])
    return tile.reshape(ROWS, HEAD_DIM)


@triton.jit
def store_tile(descriptor, origin, begin, head, values, TILE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Stores a tile `[rows, head_dim]` that starts at member `begin` through the bulk copy engine, rows outside the map
    left out."""
    tile = values.to(descriptor.dtype).reshape(1, TILE[0], TILE[1], TILE[2], HEAD_DIM)
    descriptor.store([origin, begin[0], begin[1], begin[2], head * HEAD_DIM], tile)
