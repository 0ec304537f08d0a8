"""What the kernels of columns share, in Gluon: small windows at head_dim 32 on Hopper, with few scores beside the
windows and little to do beside the scores.

A program is one warp. It owns a *column*: tokens along t, or on a map along its first axis, at four places side by
side. It goes through the columns of the places around it, a step each. A *block* is four tokens along t at the four
places, 16 rows of a matrix product. Of the pairs of blocks of two columns, a step works on those that some window spans
along t. Which these are is known when compiling, for they lie the same way in all columns (`column_blocks.py`).

So a step has a dozen products of blocks that do not wait for each other, and what they share is worked out once: their
copies, the masks along h and w, and the biases of blocks that are equally far apart.

Columns are copied into a ring of two stages. A step first starts the copies of the next one, over what the step before
it has read, and then waits for its own: phase `i // 2` of stage `i % 2` for step `i`, whose parity is kept in `phase`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from fused_na.triton.neighborhood import (
    below,
    bias_center,
    bias_position,
    clamped,
    dilated,
    inverse_window,
    inverse_windows,
    mask,
    read_only_masked,
    unravel,
    window,
    windows,
)

LOG2_E = gl.constexpr(1.4426950408889634)
STAGES = gl.constexpr(2)
SCORES = gl.constexpr(gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, SCORES.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, SCORES.value, 2))
ROW = gl.constexpr(gl.SliceLayout(1, SCORES.value))
COLUMN = gl.constexpr(gl.SliceLayout(0, SCORES.value))


@gluon.jit
def allocate_barriers():
    """Those of the stages, and those of one or two own columns."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    own_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), 1)
        mbarrier.init(own_full.index(stage), 1)
    fence_async_shared()
    return full, own_full


@gluon.jit
def allocate(descriptor, COLUMNS: gl.constexpr):
    """Room for so many columns, or boxes of them."""
    return gl.allocate_shared_memory(descriptor.dtype, [COLUMNS] + descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def fill(tensors, buffers, full, stage, origin, begin, head, exists, BOXES: gl.constexpr):
    """Starts the copies of a column of some tensors into a stage, where it exists: boxes side by side along t."""
    BOX: gl.constexpr = tensors[0].block_type.shape[1]
    mbarrier.expect(full.index(stage), len(tensors) * BOXES * tensors[0].block_type.nbytes, pred=exists)
    for i in gl.static_range(len(tensors)):
        for box in gl.static_range(BOXES):
            place = [origin, begin[0] + box * BOX, begin[1], begin[2], head * tensors[i].block_type.shape[4]]
            tma.async_copy_global_to_shared(
                tensors[i], place, full.index(stage), buffers[i].index(stage * BOXES + box), pred=exists
            )


@gluon.jit
def turned(stage, phase):
    """Stage and phase of the next step."""
    return stage ^ 1, phase ^ stage


@gluon.jit
def block(buffers, stage, index, BOXES: gl.constexpr):
    """A block of a stage's column as a matrix in shared memory, `[16, head_dim]`."""
    BLOCKS: gl.constexpr = buffers.shape[2] // 4  # of a box
    box = buffers.index(stage * BOXES + index // BLOCKS).reshape([16 * BLOCKS, buffers.shape[5]])
    return box.slice(16 * (index % BLOCKS), 16)


@gluon.jit
def places(TILE: gl.constexpr, layout: gl.constexpr):
    """Coordinates of a block's tokens in a column of these extents."""
    BLOCK: gl.constexpr = (4, TILE[1], TILE[2])
    return unravel(gl.arange(0, 16, layout), BLOCK)


@gluon.jit
def neighbors(
    begin,
    members,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    OWN_TILE: gl.constexpr,
    TILE: gl.constexpr,
    OVER_KEYS: gl.constexpr,
):
    """What an own column meets: intervals of the rows of its first block, the first token, and how many columns there
    are along h and w."""
    member = clamped(begin, places(OWN_TILE, ROW), members)
    last_member = clamped(begin, (OWN_TILE[0] - 1, OWN_TILE[1] - 1, OWN_TILE[2] - 1), members)
    if OVER_KEYS:
        rows = windows(member, members, KERNEL, STRIDE, CAUSAL)
        first, first_end = windows(begin, members, KERNEL, STRIDE, CAUSAL)
        last, last_end = windows(last_member, members, KERNEL, STRIDE, CAUSAL)
    else:
        rows = inverse_windows(member, members, KERNEL, STRIDE, CAUSAL)
        first, first_end = inverse_windows(begin, members, KERNEL, STRIDE, CAUSAL)
        last, last_end = inverse_windows(last_member, members, KERNEL, STRIDE, CAUSAL)
    counts = (gl.cdiv(last_end[1] - first[1], TILE[1]), gl.cdiv(last_end[2] - first[2], TILE[2]))
    return rows, first, counts


@gluon.jit
def following(step, counts, SHARERS: gl.constexpr):
    """The step after `(sharer, h, w)`, where each sharer meets `counts` columns along h and w; after the last one, the
    first."""
    sharer, h, w = step
    w += 1
    carry = w == counts[1]
    w = gl.where(carry, 0, w)
    h = gl.where(carry, h + 1, h)
    carry = h == counts[0]
    h = gl.where(carry, 0, h)
    if SHARERS > 1:
        sharer = gl.where(carry, sharer + 1, sharer)
        sharer = gl.where(sharer == SHARERS, 0, sharer)
    return sharer, h, w


@gluon.jit
def block_biases(base, masks, ROWS: gl.constexpr, COLUMNS: gl.constexpr, KERNEL: gl.constexpr, SIGN: gl.constexpr):
    """As `neighborhood.load_biases`, of two blocks, where masks are 0; elsewhere these."""
    row, column = gl.arange(0, 16, ROW), gl.arange(0, 16, COLUMN)
    row_lane, row_rest = unravel(row & 7, ROWS), unravel(row & -8, ROWS)
    column_lane, column_rest = unravel(column & 6, COLUMNS), unravel(column & -7, COLUMNS)
    lane = bias_position(column_lane, KERNEL)[None, :] - bias_position(row_lane, KERNEL)[:, None]
    rest = bias_position(column_rest, KERNEL)[None, :] - bias_position(row_rest, KERNEL)[:, None]
    return read_only_masked(masks, base + SIGN * lane + SIGN * rest)


@gluon.jit
def initial_scores(
    rows,
    rpb,
    head,
    begin,
    other_begin,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
    OWN_TILE: gl.constexpr,
    TILE: gl.constexpr,
    KERNEL: gl.constexpr,
    OVER_KEYS: gl.constexpr,
):
    """What the scores of two blocks start from, masks along h and w and biases: for each of `SPAN` distances from the
    own block to the other, the first one `FIRST`."""
    SIGN: gl.constexpr = 1 if OVER_KEYS else -1
    ROWS: gl.constexpr = (4, OWN_TILE[1], OWN_TILE[2])
    COLUMNS: gl.constexpr = (4, TILE[1], TILE[2])
    ROW_PLANE: gl.constexpr = (1, OWN_TILE[1], OWN_TILE[2])
    COLUMN_PLANE: gl.constexpr = (1, TILE[1], TILE[2])
    spatial = mask(rows[0], rows[1], other_begin, places(TILE, COLUMN), ROW_PLANE, COLUMN_PLANE)
    initials = gl.tuple(())
    for i in gl.static_range(SPAN):
        initial = spatial
        if rpb is not None:
            apart = bias_position(other_begin, KERNEL) - bias_position(begin, KERNEL)
            apart += bias_position((4 * (FIRST + i), 0, 0), KERNEL)
            table = rpb + head * ((2 * KERNEL[0] - 1) * (2 * KERNEL[1] - 1) * (2 * KERNEL[2] - 1)) + bias_center(KERNEL)
            initial = block_biases(table + SIGN * apart, spatial, ROWS, COLUMNS, KERNEL, SIGN)
        initials = initials + (initial,)
    return initials


@gluon.jit
def initial_of(
    initials,
    a: gl.constexpr,
    b: gl.constexpr,
    begin,
    other_begin,
    members,
    MOVING: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    OWN_TILE: gl.constexpr,
    TILE: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    OVER_KEYS: gl.constexpr,
):
    """That of own block `a` and block `b`, with the mask along t where they need one."""
    initial = initials[b - a - FIRST]
    if not ((WHOLE >> (a * MOVING + b)) & 1):
        row = gl.minimum(begin[0] + 4 * a + places(OWN_TILE, ROW)[0], members[0] - 1)
        if OVER_KEYS:
            start, end = window(row, members[0], KERNEL[0], STRIDE[0], CAUSAL[0])
        else:
            start, end = inverse_window(row, members[0], KERNEL[0], STRIDE[0], CAUSAL[0])
        column = other_begin[0] + 4 * b + places(TILE, COLUMN)[0]
        # start <= x < end in one unsigned comparison.
        inside = (column[None, :] - start[:, None]).to(gl.uint32, bitcast=True)
        initial = gl.where(inside < (end - start).to(gl.uint32, bitcast=True)[:, None], initial, float("-inf"))
    return initial


@gluon.jit
def rows_of(series, begin, inner, group, dilations, lengths, members):
    """Where the numbers of tokens `begin + inner` lie in `[B, heads, *spatial]`, of which `series` is the place among
    batch and heads, and which of the tokens exist."""
    place = (begin[0] + inner[0], begin[1] + inner[1], begin[2] + inner[2])
    token = dilated(group, place, dilations)
    tokens = lengths[2].to(gl.int64) * lengths[1] * lengths[0]
    row = (token[0] * lengths[1] + token[1]) * lengths[2] + token[2]
    return series * tokens + row, below(begin, inner, members) & (place[0] >= 0)
