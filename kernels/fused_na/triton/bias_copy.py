"""Copies relative positional biases into the form in which the other kernels take them."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents


@triton.jit(do_not_specialize=["margin", "biases"])
def bias_copy_kernel(
    rpb,
    biases_copy,
    scale,
    margin,
    biases,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,  # whether the next kernel may start, if it waits for the copy before it reads that
):
    """Float32 biases of scores that are yet to be scaled, with `margin` zeros before and after them."""
    if OVERLAP:
        gdc_launch_dependents()
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bias = place - margin
    exists = (bias >= 0) & (bias < biases)
    copied = tl.math.div_rn(tl.load(rpb + bias, mask=exists, other=0.0).to(tl.float32), scale)
    tl.store(biases_copy + place, copied, mask=place < biases + 2 * margin)
