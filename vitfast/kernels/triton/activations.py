"""The activations of ViTs and their derivatives, in fp32, for use inside kernels.

erf is Abramowitz and Stegun 7.1.26: five terms and one exponential, which is the one that the derivative of GELU needs
as well. Its absolute error of 1.5e-7 makes GELU differ from the true one by at most 4.6e-7; torch's own, in fp32, by
1.2e-6. Rational approximations that clamp their argument are wrong in the tail (GELU(-1e4) = 6e-4).
"""

import triton
import triton.language as tl

from vitfast.kernels.triton.addresses import advance

# Triton's interpreter knows no assembler
COMPILED = tl.constexpr(isinstance(advance, triton.JITFunction))
# right of tensors: in the interpreter of Triton 3.8 what begins with a constexpr stays one
LOG2E = tl.constexpr(1.4426950408889634)
# beyond it the sigmoid inside the tanh form is 0 or 1 in fp32, and the cube of the largest numbers is infinite
TANH_ENDS = tl.constexpr(16.0)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBE = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)


@triton.jit
def reciprocal(x):  # fp32 [...], at least 1
    """1 / x to 1 ulp, in one instruction; division by anything takes seven."""
    if COMPILED:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):  # fp32 [...]
    return reciprocal(1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def sigmoid_and_slope(x):  # fp32 [...]
    """The slope is not s (1 - s), which loses all digits of 1 - s where s is near 1."""
    e = tl.exp2(tl.abs(x) * -LOG2E)
    r = reciprocal(1.0 + e)
    return tl.where(x < 0.0, e * r, r), e * r * r


@triton.jit
def normal_cdf(x):  # fp32 [...]
    """Phi(x) and exp(-x^2 / 2)."""
    a = tl.abs(x) * 0.7071067811865476
    bell = tl.exp2(a * -LOG2E * a)
    t = reciprocal(1.0 + 0.3275911 * a)
    p = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    tail = 0.5 * p * bell
    return tl.where(x < 0.0, tail, 1.0 - tail), bell


@triton.jit
def activate(x, ACT: tl.constexpr):  # fp32 [...]
    """ACT: "none", "gelu", "gelu_tanh", "quick_gelu", "silu"."""
    if ACT == "gelu":
        cdf, _ = normal_cdf(x)
        x = x * cdf
    elif ACT == "gelu_tanh":
        near = tl.minimum(tl.maximum(x, -TANH_ENDS, tl.PropagateNan.ALL), TANH_ENDS, tl.PropagateNan.ALL)
        x = x * sigmoid((near + near * TANH_CUBE * near * near) * TANH_SCALE)
    elif ACT == "quick_gelu":
        x = x * sigmoid(x * QUICK)
    elif ACT == "silu":
        x = x * sigmoid(x)
    return x


@triton.jit
def activate_and_slope(x, ACT: tl.constexpr):  # fp32 [...]
    """The activation at x, and its derivative."""
    slope = x * 0.0 + 1.0
    y = x
    if ACT == "gelu":
        cdf, bell = normal_cdf(x)
        y = x * cdf
        slope = cdf + x * bell * 0.3989422804014327
    elif ACT == "gelu_tanh":
        near = tl.minimum(tl.maximum(x, -TANH_ENDS, tl.PropagateNan.ALL), TANH_ENDS, tl.PropagateNan.ALL)
        square = near * near
        s, more = sigmoid_and_slope((near + near * TANH_CUBE * square) * TANH_SCALE)
        y = x * s
        slope = s + near * more * (square * (3.0 * TANH_SCALE * TANH_CUBE) + TANH_SCALE)
    elif ACT == "quick_gelu":
        s, more = sigmoid_and_slope(x * QUICK)
        y = x * s
        slope = s + x * QUICK * more
    elif ACT == "silu":
        s, more = sigmoid_and_slope(x)
        y = x * s
        slope = s + x * more
    return y, slope
