"""Matrix products in the precision that the caller's settings ask for."""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


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


@triton.jit
def reciprocal(x):
    """`1 / x` of a normal number, to one unit in the last place: an instruction, where the division takes ten."""
    if INTERPRETED:
        return 1.0 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def log2(x):
    """Logarithm of a normal number, to 2**-22: an instruction, where `tl.log2` takes 24 for a few bits more."""
    if INTERPRETED:
        return tl.log2(x)
    return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
