"""Matrix products in the precision that the caller's settings ask for."""

import triton
import triton.language as tl


@triton.jit
def rounded_to_tf32(x):
    """Rounds float32 to the ten bits of mantissa that tf32 has; the matrix units would cut the others off, which
    shrinks every product by 0.1 %.
    """
    bits = x.to(tl.int32, bitcast=True)
    is_finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(is_finite, (bits + 0x1000) & -0x2000, bits).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, accumulator=None, PRECISION: tl.constexpr = "ieee"):
    """`a @ b + accumulator` in float32, where `PRECISION` ("ieee" or "tf32") says how float32 operands are taken."""
    if PRECISION == "tf32" and a.dtype == tl.float32:
        a, b = rounded_to_tf32(a), rounded_to_tf32(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)
