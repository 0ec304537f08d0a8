"""The query's gradient by columns, and with it that of the relative positional bias; see `columns.py`.

At a step, a pair's relative position depends on its places in the blocks and on how far these are apart, not on the
sample. So pairs are added up first over the pairs of blocks at one distance, then over the pairs of a thread that share
a relative position, and then over the samples and columns of a program, in memory, where every thread has words of its
own. There are no atomics and no exchange between threads, and the order of additions is fixed.

Sums mean the same relative positions wherever the first column of keys lies as far from that of the queries. Such
columns make a class (`column_classes.py`). The columns of a head, with a sample each, are shared out in the order of
their classes, and programs leave a row of sums for each class that they meet (`bias_places.py`). `fold_columns.py` adds
them up. Within a class, its programs take the columns of a sample in turn, then those of the next one: what they read
at a time lies side by side, and comes from memory once.

Few sums, as those of maps, stay in shared memory until a class ends.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.language.extra.cuda import gdc_wait

from fused_na.triton.bias_places import (
    class_of_place,
    columns_of_class,
    first_place,
    item_in_turn,
    plain,
    unravel_along,
)
from fused_na.triton.columns import (
    COLUMN,
    LEFT,
    LOG2_E,
    RIGHT,
    ROW,
    SCORES,
    STAGES,
    allocate,
    allocate_barriers,
    block,
    fill,
    following,
    initial_of,
    initial_scores,
    neighbors,
    places,
    rows_of,
    turned,
)
from fused_na.triton.neighborhood import copy_origin, divided, locate

PAIRS = gl.constexpr(gl.BlockedLayout([1, 2], [32, 1], [1, 1], [1, 0]))  # numbers of a warp, two for each lane
LANES = gl.constexpr(64)
UNSWIZZLED = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def by_distance(pairs):
    """Sums over the pairs of a block whose distance along t is their lane's less 2, equal to it, and 2 more.

    A thread has both of the higher bits of a row's and of a column's place along t, and two neighbors: `[lane, 2]`.
    """
    split = pairs.reshape([2, 8, 2, 4, 2]).permute((1, 3, 4, 2, 0)).reshape([32, 2, 2, 2])
    first_rows, other_rows = gl.split(split)
    equal, more = gl.split(first_rows)
    less, also_equal = gl.split(other_rows)
    return (
        gl.convert_layout(less, PAIRS, assert_trivial=True),
        gl.convert_layout(equal + also_equal, PAIRS, assert_trivial=True),
        gl.convert_layout(more, PAIRS, assert_trivial=True),
    )


@gluon.jit
def lane_numbers():
    """Places of a warp's numbers."""
    lane, number = gl.arange(0, 32, gl.SliceLayout(1, PAIRS)), gl.arange(0, 2, gl.SliceLayout(0, PAIRS))
    return lane[:, None] * 2 + number[None, :]


@gluon.jit
def load_sums(pointers, mask):
    """Loads numbers, 0 where `mask` is false. They are to stay in the second level cache until the next column, and to
    leave the first level one to the biases."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred there;
        .reg .b64 keep;
        createpolicy.fractional.L2::evict_last.b64 keep, 1.0;
        setp.ne.b32 there, $4, 0;
        mov.b32 $0, 0;
        mov.b32 $1, 0;
        @there ld.global.L1::no_allocate.L2::cache_hint.v2.b32 {$0, $1}, [$2], keep;
        }""",
        "=f,=f,l,l,r,r",
        [pointers.to(gl.int64), mask.to(gl.int32)],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def store_sums(pointers, numbers):
    """Stores numbers, as `load_sums` loads them."""
    gl.inline_asm_elementwise(
        """{
        .reg .b64 keep;
        createpolicy.fractional.L2::evict_last.b64 keep, 1.0;
        st.global.L1::no_allocate.L2::cache_hint.v2.b32 [$2], {$4, $5}, keep;
        mov.b32 $0, 0;  // which nobody reads
        mov.b32 $1, 0;
        }""",
        "=r,=r,l,l,f,f",
        [pointers.to(gl.int64), numbers],
        dtype=gl.int32,
        is_pure=False,
        pack=2,
    )


@gluon.jit
def step_sums(pairs, SPAN: gl.constexpr):
    """A step's numbers, from its pairs by the distance of their blocks."""
    numbers, carried = gl.tuple(()), gl.zeros([32, 2], gl.float32, PAIRS)
    for i in gl.static_range(SPAN):
        less, equal, more = by_distance(pairs[i])
        numbers = numbers + (carried + less, equal)
        carried = more
    return numbers + (carried,)


@gluon.jit
def grad_column(
    own_tensors,
    moving,
    rpb,
    lse,
    grad_lse,
    grad_query,
    delta,
    sums,  # of a row, in memory or `IN_SHARED`, or None
    adds,  # whether those in memory are there already
    own,
    buffers,
    barriers,
    turn,
    batch,
    head,
    head_kv,
    heads,
    group,
    begin,
    rows,
    first,
    counts,
    lengths,
    members,
    dilations,
    scale,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    DILATED: gl.constexpr,
    COUNT_W: gl.constexpr,
    OWN: gl.constexpr,
    MOVING: gl.constexpr,
    LEAD: gl.constexpr,
    MET: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
    IN_SHARED: gl.constexpr,
):
    """The gradient of a column of queries of one sample, and `delta` of its rows. Returns the next turn, which is stage
    and phase of the ring and phase of the own column."""
    stage, phase, own_phase = turn
    full, own_full = barriers
    HEAD_DIM: gl.constexpr = grad_query.block_type.shape[4]
    BOXES: gl.constexpr = (4 * MOVING + KEY_TILE[0] - 1) // KEY_TILE[0]
    SUMS: gl.constexpr = 0 if sums is None else 2 * SPAN + 1
    KINDS: gl.constexpr = 0 if sums is None else SPAN
    origin = copy_origin(batch, group, lengths, DILATED)
    key_begin = (begin[0] - 4 * LEAD, first[1], first[2])
    fill(moving, buffers, full, stage, origin, key_begin, head_kv, True, BOXES)
    tma.store_wait(0)  # of the column before, from where this one comes
    fill(own_tensors, own, own_full, 0, origin, begin, head, True, 1)
    row_lse = gl.tuple(())
    for a in gl.static_range(OWN):
        block_begin = (begin[0] + 4 * a, begin[1], begin[2])
        numbers, is_query = rows_of(
            batch * heads + head, block_begin, places(QUERY_TILE, ROW), group, dilations, lengths, members
        )
        # Rows outside the map get probability 0 from an infinite log-sum-exp, whatever their scores.
        row_lse = row_lse + (gl.load(lse + numbers, mask=is_query, other=float("inf")) * LOG2_E,)

    mbarrier.wait(own_full.index(0), own_phase)
    minus_delta, grad_q = gl.tuple(()), gl.tuple(())
    for a in gl.static_range(OWN):
        block_begin = (begin[0] + 4 * a, begin[1], begin[2])
        numbers, is_query = rows_of(
            batch * heads + head, block_begin, places(QUERY_TILE, ROW), group, dilations, lengths, members
        )
        # The sums of products of rows are the diagonal of a product of matrices.
        output_rows, grad_columns = block(own[2], 0, a, 1).load(LEFT), block(own[1], 0, a, 1).permute((1, 0))
        products = mma_v2(output_rows, grad_columns.load(RIGHT), gl.zeros([16, 16], gl.float32, SCORES))
        is_same = gl.arange(0, 16, ROW)[:, None] == gl.arange(0, 16, COLUMN)[None, :]
        row_delta = gl.sum(gl.where(is_same, products, 0.0), 1)
        if grad_lse is not None:
            row_delta -= gl.load(grad_lse + numbers, mask=is_query, other=0.0)
        gl.store(delta + numbers, row_delta, mask=is_query)
        minus_delta = minus_delta + (-row_delta,)
        grad_q = grad_q + (gl.zeros([16, HEAD_DIM], gl.float32, SCORES),)

    factor = scale * LOG2_E
    step = (head * 0, head * 0, head * 0)
    steps = counts[0] * counts[1]
    for index in range(steps):
        place = step[1] * COUNT_W + step[2]
        step = following(step, counts, 1)
        next_begin = (key_begin[0], first[1] + step[1] * KEY_TILE[1], first[2] + step[2] * KEY_TILE[2])
        fill(moving, buffers, full, stage ^ 1, origin, next_begin, head_kv, index + 1 < steps, BOXES)
        old, pairs = gl.tuple(()), gl.tuple(())
        if sums is not None and not IN_SHARED:
            of_step = sums + place * (SUMS * LANES)
            is_there = (lane_numbers() >= 0) & adds
            for n in gl.static_range(SUMS):  # asked for before they are needed
                old = old + (load_sums(of_step + n * LANES, is_there),)
        for _ in gl.static_range(KINDS):
            pairs = pairs + (gl.zeros([16, 16], gl.float32, SCORES),)
        initials = initial_scores(rows, rpb, head, begin, key_begin, FIRST, SPAN, QUERY_TILE, KEY_TILE, KERNEL, True)
        mbarrier.wait(full.index(stage), phase)
        for b in gl.static_range(MOVING):
            k, v = block(buffers[0], stage, b, BOXES), block(buffers[1], stage, b, BOXES)
            k_columns, v_columns = k.permute((1, 0)).load(RIGHT), v.permute((1, 0)).load(RIGHT)
            k_rows = k.load(RIGHT)
            new_q = gl.tuple(())
            for a in gl.static_range(OWN):
                gq = grad_q[a]
                if (MET >> (a * MOVING + b)) & 1:
                    initial = initial_of(
                        initials,
                        a,
                        b,
                        begin,
                        key_begin,
                        members,
                        MOVING,
                        WHOLE,
                        FIRST,
                        QUERY_TILE,
                        KEY_TILE,
                        KERNEL,
                        STRIDE,
                        CAUSAL,
                        True,
                    )
                    q, grad_o = block(own[0], 0, a, 1).load(LEFT), block(own[1], 0, a, 1).load(LEFT)
                    probabilities = gl.exp2(mma_v2(q, k_columns, initial) * factor - row_lse[a][:, None])
                    started = minus_delta[a][:, None] + gl.zeros([16, 16], gl.float32, SCORES)
                    grad_scores = probabilities * mma_v2(grad_o, v_columns, started)
                    gq = mma_v2(gl.convert_layout(grad_scores.to(grad_query.dtype), LEFT), k_rows, gq)
                    new_pairs = gl.tuple(())
                    for i in gl.static_range(KINDS):
                        if i == b - a - FIRST:
                            new_pairs = new_pairs + (pairs[i] + grad_scores,)
                        else:
                            new_pairs = new_pairs + (pairs[i],)
                    pairs = new_pairs
                new_q = new_q + (gq,)
            grad_q = new_q
        if sums is not None:
            new = step_sums(pairs, SPAN)
            if IN_SHARED:
                for n in gl.static_range(SUMS):
                    old = old + (sums[n].index(place).load(PAIRS),)
            for n in gl.static_range(SUMS):
                if IN_SHARED:
                    sums[n].index(place).store(old[n] + new[n])
                else:
                    store_sums(of_step + n * LANES, old[n] + new[n])
        key_begin = next_begin
        stage, phase = turned(stage, phase)

    for a in gl.static_range(OWN):
        block(own[0], 0, a, 1).store((grad_q[a] * scale).to(grad_query.dtype))
    fence_async_shared()
    place = [origin, begin[0], begin[1], begin[2], head * HEAD_DIM]
    tma.async_copy_shared_to_global(grad_query, place, own[0].index(0))
    return stage, phase, own_phase ^ 1


@gluon.jit(do_not_specialize=["length_w", "heads"], do_not_specialize_on_alignment=["length_t", "length_h"])
def query_columns_kernel(
    query,
    key,
    value,
    rpb,
    output,
    lse,
    grad_output,
    grad_lse,
    grad_query,
    delta,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    divisors,  # as in `query_kernel`
    heads,
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    DILATED: gl.constexpr,
    OWN: gl.constexpr,  # this and the next six: `column_blocks.Blocks`
    MOVING: gl.constexpr,
    LEAD: gl.constexpr,
    MET: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
):
    """The gradient of a column of queries, and `delta` of its rows, which the other kernels read. Tensors of heads as
    descriptors."""
    BOXES: gl.constexpr = (4 * MOVING + KEY_TILE[0] - 1) // KEY_TILE[0]
    own = (allocate(query, 1), allocate(grad_output, 1), allocate(output, 1))
    buffers = (allocate(key, STAGES * BOXES), allocate(value, STAGES * BOXES))
    barriers = allocate_barriers()
    lengths = (length_t, length_h, length_w)
    rest, group, members, begin = locate(gl.program_id(0), lengths, dilations, divisors, QUERY_TILE, DILATED)
    sample = divided(rest, divisors[6])
    head = rest - sample * heads
    rows, first, counts = neighbors(begin, members, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, True)
    grad_column(
        (query, grad_output, output),
        (key, value),
        rpb,
        lse,
        grad_lse,
        grad_query,
        delta,
        None,
        False,
        own,
        buffers,
        barriers,
        (0, 0, 0),
        sample.to(gl.int64),
        head,
        head // HEADS_PER_KV,
        heads,
        group,
        begin,
        rows,
        first,
        counts,
        lengths,
        members,
        dilations,
        scale,
        KERNEL,
        STRIDE,
        CAUSAL,
        QUERY_TILE,
        KEY_TILE,
        DILATED,
        1,
        OWN,
        MOVING,
        LEAD,
        MET,
        WHOLE,
        FIRST,
        SPAN,
        False,
    )
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["length_t", "length_h", "length_w", "heads", "chunks", "items", "share", "rows"])
def query_bias_columns_kernel(
    query,
    key,
    value,
    rpb,
    output,
    lse,
    grad_output,
    grad_lse,
    grad_query,
    delta,
    partial,
    scale,
    length_t,
    length_h,
    length_w,
    dilations,
    before,  # columns before those that are alike, along each axis: `column_classes.Classes`; odd, as the next two
    alike,
    all_places,  # columns, along each axis
    heads,
    chunks,  # samples and groups: items of a place
    items,  # of a head
    share,  # items of a program
    rows,  # of a head
    HEADS_PER_KV: gl.constexpr,
    KERNEL: gl.constexpr,
    STRIDE: gl.constexpr,
    CAUSAL: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    KEY_TILE: gl.constexpr,
    DILATED: gl.constexpr,
    OVERLAP: gl.constexpr,  # whether the copy of the bias, launched just before, may still be under way
    COUNTS: gl.constexpr,  # most columns of keys of a column of queries, along each axis
    OWN: gl.constexpr,  # as in `query_columns_kernel`
    MOVING: gl.constexpr,
    LEAD: gl.constexpr,
    MET: gl.constexpr,
    WHOLE: gl.constexpr,
    FIRST: gl.constexpr,
    SPAN: gl.constexpr,
    IN_SHARED: gl.constexpr,  # whether sums are kept in shared memory
):
    """The same for a share of the columns of one head, and its sums of `ds`: `partial` is
    `[heads, rows, h, w, distance, lane, 2]`."""
    SUMS: gl.constexpr = 2 * SPAN + 1  # of a step, numbers of a warp
    STEPS: gl.constexpr = COUNTS[1] * COUNTS[2]
    BOXES: gl.constexpr = (4 * MOVING + KEY_TILE[0] - 1) // KEY_TILE[0]
    own = (allocate(query, 1), allocate(grad_output, 1), allocate(output, 1))
    buffers = (allocate(key, STAGES * BOXES), allocate(value, STAGES * BOXES))
    barriers = allocate_barriers()
    shared_sums = gl.tuple(())
    if IN_SHARED:
        for _ in gl.static_range(SUMS):  # each its own memory, lest accesses wait for each other
            shared_sums = shared_sums + (gl.allocate_shared_memory(gl.float32, [STEPS, 32, 2], UNSWIZZLED),)
    before, alike, all_places = plain(before), plain(alike), plain(all_places)
    lengths = (length_t, length_h, length_w)
    members = lengths
    if DILATED:
        members = (length_t // dilations[0], length_h // dilations[1], length_w // dilations[2])
    pid = gl.program_id(0)
    head, program = pid % heads, pid // heads  # programs of all heads read the same part of memory at a time
    if OVERLAP:
        gdc_wait()

    turn = (0, 0, 0)
    classes_w = all_places[2] - alike[2] + 1
    last_item = gl.minimum(program * share + share, items) - 1
    first_kind = class_of_place(program * share // chunks, before, alike, all_places)
    last_kind = class_of_place(last_item // chunks, before, alike, all_places)
    for kind in range(first_kind, last_kind + 1):
        first_column, size = columns_of_class(kind // classes_w, kind % classes_w, before, alike, all_places)
        places_of_class = size[0] * size[1] * size[2]
        first_item = first_place(first_column, size, all_places) * chunks
        next_item = first_item + places_of_class * chunks
        begin_of_class = first_item // share, first_item % share
        end_of_class = next_item // share, next_item % share
        row = partial + (head * rows + program + kind) * (STEPS * SUMS * LANES) + lane_numbers()
        if IN_SHARED:
            for step in range(STEPS):
                for n in gl.static_range(SUMS):
                    shared_sums[n].index(step).store(gl.zeros([32, 2], gl.float32, PAIRS))
        first_turn = gl.where(program > begin_of_class[0], 0, begin_of_class[1])
        for number in range(first_turn, gl.where(program < end_of_class[0], share, end_of_class[1])):
            item = item_in_turn(number, program, begin_of_class, end_of_class)
            sample, group = item // places_of_class, (0, 0, 0)
            t, h, w = unravel_along(item % places_of_class, size)
            h, w = first_column[1] + h, first_column[2] + w
            begin = (t * QUERY_TILE[0], h * QUERY_TILE[1], w * QUERY_TILE[2])
            column_rows, first, counts = neighbors(begin, members, KERNEL, STRIDE, CAUSAL, QUERY_TILE, KEY_TILE, True)
            if not IN_SHARED:
                if number == first_turn:  # nothing will come to what this column does not meet
                    for step in range(STEPS):
                        if (step // COUNTS[2] >= counts[0]) | (step % COUNTS[2] >= counts[1]):
                            for n in gl.static_range(SUMS):
                                gl.store(row + (step * SUMS + n) * LANES, gl.zeros([32, 2], gl.float32, PAIRS))
            if DILATED:
                groups = dilations[0] * dilations[1] * dilations[2]
                group, sample = unravel_along(sample % groups, dilations), sample // groups
            turn = grad_column(
                (query, grad_output, output),
                (key, value),
                rpb,
                lse,
                grad_lse,
                grad_query,
                delta,
                shared_sums if IN_SHARED else row,
                number > first_turn,
                own,
                buffers,
                barriers,
                turn,
                sample.to(gl.int64),
                head,
                head // HEADS_PER_KV,
                heads,
                group,
                begin,
                column_rows,
                first,
                counts,
                lengths,
                members,
                dilations,
                scale,
                KERNEL,
                STRIDE,
                CAUSAL,
                QUERY_TILE,
                KEY_TILE,
                DILATED,
                COUNTS[2],
                OWN,
                MOVING,
                LEAD,
                MET,
                WHOLE,
                FIRST,
                SPAN,
                IN_SHARED,
            )
        if IN_SHARED:
            for step in range(STEPS):
                for n in gl.static_range(SUMS):
                    gl.store(row + (step * SUMS + n) * LANES, shared_sums[n].index(step).load(PAIRS))
    tma.store_wait(0)
