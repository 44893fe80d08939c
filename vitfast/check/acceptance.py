"""What counts as numerically right. Tests, parity, warm-up, tuning and benchmarks hold results to this rule.

A result is judged by its distance from an fp64 reference, next to the distance of the best stock PyTorch
operator in the same dtype. An absolute tolerance would let bias and lost rows pass in half precision.

What rounding makes inevitable. A number is rounded by up to half a unit in its last place, evenly: by ulp / sqrt(12)
in the mean. With its logarithm spread evenly over an octave the mean of (ulp / x)^2 is eps^2 times the integral of
m^-2 / (m ln 2) over [1, 2), 3 / (8 ln 2), so one rounding is off by eps sqrt(3 / (96 ln 2)) = 0.2123 eps. One
accumulator that adds up n terms of equal size and random sign rounds n sums, which grow as sqrt(j): the squares of its
errors add up to ROUNDING^2 eps^2 (1 + ... + n) / n = ROUNDING^2 eps^2 (n + 1) / 2 of the result's (Higham and Mary, "A
new approach to probabilistic rounding error analysis", 2019). Measured for 192 terms: 2.10 eps, where this says 2.09.
Pieces of L terms whose sums are added up likewise count as L + n / L.

So a product in fp32 by one accumulator of 192 terms is off by 2.1 eps, one with eight accumulators by 0.8, and one in
fp64 rounded once by 0.2. Which of these a CPU's library computes changes with its instructions and with the number of
rows, and no k below bridges them. In half precision the sum in fp32 rounded once is off by 0.21 eps, and a CPU that
rounds on the way by some times that. So tests on CPUs do not take the machine's products for `low`, but those of
tests/textbook.py: one accumulator over 192 terms, which is what MKL and oneDNN compute without AVX-512 and for many
rows (to 5 % where we compared), and one rounding in half precision. On a GPU `low` is what its libraries compute.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# rms error of one rounding, in eps
ROUNDING = (3 / (96 * math.log(2))) ** 0.5
# rms of the error may be this multiple of the stock operator's (rule C). Wider in fp32, where a different but
# correct order of summation alone moves the error by more than in half precision.
RMS_RATIO = {torch.float32: 2.0, torch.float16: 1.25, torch.bfloat16: 1.25}
# a stock operator whose error is above this many eps is no yardstick (rule D)
YARDSTICK_EPS = {torch.float32: 32.0, torch.float16: 1.0, torch.bfloat16: 1.0}
# rounding floor of the rms clauses, in eps: lets a result pass where the stock operator happens to be exact
RMS_FLOOR_EPS = 0.05
# by how much the rms of one stage differed between equally exact models (tests/test_parity_timm.py), twice
LUCK = {torch.float32: 24.0, torch.bfloat16: 4.0, torch.float16: 4.0}
MODEL_RMS_RATIO = 1.25
# by how much two models of one formula may differ in fp64, as a share of what a stage adds. Rounding makes 14 eps of a
# product of 8192 terms (ROUNDING, above); norms and softmax after a massive activation multiply that by what it is more
# than the rest, 1e3 times gains of 10: 1.4e5 eps, for which 2^22 eps, 9e-10, leaves as much again as luck may do. What
# is least of other formulas, norms with an eps of 1e-12 for 1e-6, is 5e-7 at a variance of 1.
FORMULA = 2**22 * torch.finfo(torch.float64).eps
# the same where one of them resampled positions in fp32: one unit in the last place, as clause A allows
FORMULA_OF_FP32 = torch.finfo(torch.float32).eps


class NotAccepted(AssertionError):
    """A result outside the rule; the message names every violated clause with its numbers."""


def accept(
    out: Tensor,
    ref: Tensor,
    low: Tensor,
    *,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    k: float | None = None,
    what: str = "",
) -> None:
    """Raise NotAccepted naming every violated clause, with its numbers.

    0. out has the shape, dtype and device of `low` and the NaN and +-Inf masks of `ref` rounded to that
       dtype (strides are tested with each op); the finite part is then held to
    A. max|out - ref| <= r * max|low - ref| + eps * max|ref|
    B. for every row (last dim), rms(out - ref) <= r * worst row rms(low - ref) + eps * rms(ref)
    C. rms(out - ref) <= k * rms(low - ref) + 0.05 * eps * rms(ref)
    D. rms(low - ref) <= 1 eps * rms(ref) (fp32: 32 eps), or else the case has no usable yardstick

    Args:
        out: the result under test. 0-d and 1-d tensors are one row.
        ref: the reference in fp64, computed on the inputs rounded to T.
        low: the best stock operator in T (not a naive chain of operators).
        dtype: T, which sets eps and k, where it isn't `out.dtype`: lse and fp32 residuals are wider than T.
        grad: r = 3 in place of 2.
        k: in place of 1.25 (fp16, bf16) or 2 (fp32).
        what: names the case in the message.
    """
    dtype = dtype or out.dtype
    faults = _contract_faults(out, ref, low)
    if not faults and out.numel():
        eps, r, k = _eps(dtype), 3.0 if grad else 2.0, RMS_RATIO[dtype] if k is None else k
        finite, ref_rows, e_out, e_low, faults = _errors(out, ref, low)
        bound = r * e_low.max() + eps * ref_rows.abs().max()
        if not e_out.max() <= bound:
            at = _index(e_out.argmax(), out.shape)
            faults.append(f"A: max error {e_out.max():.3e} at {at} > {bound:.3e} (stock's {e_low.max():.3e})")

        row_out, row_low, row_ref = (_rms(t, finite, -1) for t in (e_out, e_low, ref_rows))
        bounds = r * row_low.max() + eps * row_ref
        bad = ~(row_out <= bounds)
        if bad.any():
            worst = (row_out - bounds).argmax()
            faults.append(
                f"B: {int(bad.sum())} of {bad.numel()} rows; worst {_index(worst, out.shape[:-1])} with rms "
                f"error {row_out[worst]:.3e} > {bounds[worst]:.3e} (stock's worst {row_low.max():.3e})"
            )

        rms_out, rms_low, rms_ref = (_rms(t, finite) for t in (e_out, e_low, ref_rows))
        bound = rms_bound(rms_low, rms_ref, dtype, k)
        if not rms_out <= bound:
            times = f"{rms_out / rms_low:.2f} x stock's {rms_low:.3e}"
            faults.append(f"C: rms error {rms_out:.3e} > {bound:.3e} ({times}, k = {k})")
        if not rms_low <= YARDSTICK_EPS[dtype] * eps * rms_ref:
            times = f"{rms_low / (eps * rms_ref):.2f} eps of rms(ref) {rms_ref:.3e}"
            faults.append(f"D: no yardstick: stock's rms error {rms_low:.3e} is {times}")
    _raise(faults, what, dtype)


def rms_bound(rms_low: Any, rms_ref: Any, dtype: torch.dtype, k: float | None = None) -> Any:
    """Clause C of `accept`: what rms(out - ref) may be at most, where stock's is `rms_low`."""
    return (RMS_RATIO[dtype] if k is None else k) * rms_low + RMS_FLOOR_EPS * _eps(dtype) * rms_ref


def accept_results(
    outs: Sequence[Tensor | None],
    refs: Sequence[Tensor | None],
    lows: Sequence[Tensor | None],
    *,
    dtype: torch.dtype | None = None,
    grad: bool = False,
    what: str = "",
) -> None:
    """`accept` for every result of an op, None where there is none, with k by how many numbers it has."""
    if len(outs) != len(lows):
        raise NotAccepted(f"{what or 'op'}: {len(outs)} results, expected {len(lows)}")
    for i, (out, ref, low) in enumerate(zip(outs, refs, lows, strict=True)):
        named = f"{what}, result {i}" if what else f"result {i}"
        if (out is None) != (low is None):
            raise NotAccepted(f"{named}: there is none" if out is None else f"{named}: it is there, expected none")
        if out is not None:
            k = rms_ratio_of_few(low.numel(), dtype or out.dtype)
            accept(out, ref, low, dtype=dtype, grad=grad, k=k, what=named)


def dtype_to_judge_by(dtype: torch.dtype, convolution: bool = False) -> torch.dtype:
    """fp16 for fp32 where a GPU's stock products may be rounded to TF32, which keeps as many bits."""
    tf32 = torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")
    tf32 |= convolution and torch.backends.cudnn.allow_tf32
    return torch.float16 if tf32 and dtype == torch.float32 else dtype


def rms_ratio_of_few(numbers: int, dtype: torch.dtype) -> float:
    """k of `accept` for a result of so many numbers: the fewer, the more two rms errors differ by chance alone."""
    return RMS_RATIO[dtype] * (1 + 8 * max(numbers, 1) ** -0.5)


def accept_model(out: Tensor, ref: Tensor, low: Tensor, *, what: str = "") -> None:
    """The rule for whole models: relative rms error at most 1.25 x the eager model's in the same dtype.

    A floor of 0.05 eps is added, for cases where eager is exact. Arguments and clause 0 as in `accept`.
    """
    faults = _contract_faults(out, ref, low)
    if not faults and out.numel():
        finite, ref_rows, e_out, e_low, faults = _errors(out, ref, low)
        rms_out, rms_low, rms_ref = (_rms(t, finite) for t in (e_out, e_low, ref_rows))
        if not rms_out <= MODEL_RMS_RATIO * rms_low + RMS_FLOOR_EPS * _eps(out.dtype) * rms_ref:
            faults.append(
                f"relative rms error {rms_out / rms_ref:.3e} is {rms_out / rms_low:.2f} x eager's "
                f"{rms_low / rms_ref:.3e}, more than {MODEL_RMS_RATIO} x"
            )
    _raise(faults, what, out.dtype)


def accept_coarse(outs: Sequence[Tensor], refs: Sequence[Tensor], tolerance: float) -> None:
    """What int8 is held to, which no rule of a wider dtype can be: `distance` of each result at most `tolerance`."""
    error, _ = distance(outs, refs)
    if not error <= tolerance:
        raise NotAccepted(f"rms error {error:.1%} of the results', more than {tolerance:.1%}")


def distance(outs: Sequence[Tensor], refs: Sequence[Tensor]) -> tuple[float, float]:
    """rms(out - ref) as a share of rms(ref), the worst of the results; and the lowest cosine between out[i] and ref[i].

    Both are NaN where a result has one.
    """
    pairs = [(out.double().flatten(1), ref.to(out.device).flatten(1)) for out, ref in zip(outs, refs, strict=True)]
    errors = torch.stack([(out - ref).norm() / ref.norm() for out, ref in pairs])
    cosines = torch.cat([torch.cosine_similarity(*pair) for pair in pairs])
    return errors.max().item(), cosines.min().item()


def accept_stages(
    outs: dict[str, Tensor], refs: dict[str, Tensor], lows: dict[str, Tensor], *, typical: float = MODEL_RMS_RATIO
) -> None:
    """Whether a model's stages, each [..., D], are as exact as the eager model's in the same dtype.

    Two models that do not add in the same order differ most in the few rows with massive activations, where luck
    decides which is nearer to the truth: of two equally exact ones either may be 12 x as far off by the rms of a stage
    of three rows. So the typical row of all stages is held to `typical` (geometric mean over the rows of error by
    eager's error), and the rms of each stage to what luck has been seen to do, twice.
    """
    if outs.keys() != lows.keys():
        raise NotAccepted(f"stages {list(outs)}, expected {list(lows)}")
    logs, faults, dtype = [], [], next(iter(outs.values())).dtype
    for name, out in outs.items():
        found, rows = stage_faults(out, refs[name], lows[name])
        faults += [f"{name}: {fault}" for fault in found]
        if rows is not None:
            logs.append(rows)
    if logs:
        ratio = torch.cat(logs).mean().exp()
        if not ratio <= typical:
            faults.append(f"the typical row is {ratio:.2f} x as far off as eager's, more than {typical} x")
    _raise(faults, "stages", dtype)


def stage_faults(out: Tensor, ref: Tensor, low: Tensor, *, few: bool = False) -> tuple[list[str], Tensor | None]:
    """What `accept_stages` has against one stage, and for each of its rows the logarithm of error by eager's error.

    None in the place of the rows where clause 0 of `accept` is broken. few: let luck do more to a stage of few numbers
    (`rms_ratio_of_few`), as where it may be logits alone.
    """
    faults = _contract_faults(out, ref, low)
    if faults:
        return faults, None
    dtype = out.dtype
    luck, floor = LUCK[dtype], RMS_FLOOR_EPS * _eps(dtype)
    luck *= rms_ratio_of_few(out.numel(), dtype) / RMS_RATIO[dtype] if few else 1.0
    finite, ref_rows, e_out, e_low, faults = _errors(out, ref, low)
    rms_out, rms_low, rms_ref = (_rms(t, finite) for t in (e_out, e_low, ref_rows))
    if not rms_out <= luck * rms_low + floor * rms_ref:
        faults.append(f"rms error {rms_out:.3e} is {rms_out / rms_low:.2f} x eager's, more than {luck} x")
    row_out, row_low, row_ref = (_rms(t, finite, dim=-1) for t in (e_out, e_low, ref_rows))
    floors = floor * row_ref + torch.finfo(torch.float64).tiny
    return faults, ((row_out + floors) / (row_low + floors)).log()


def rounded_anew(dtype: torch.dtype) -> float:
    """What is left of a difference that was folded into weights, which were rounded to `dtype` after it."""
    return LUCK[dtype] * _eps(dtype)


def apart(value: Tensor, exact: Tensor, base: Tensor | None = None) -> float:
    """rms(value - exact) over rms(exact), or over that of what `exact` adds to `base`; NaN where either has one.

    What is added counts for so much that one rounding of the sum is no more than `FORMULA`: of a branch with a
    LayerScale of 1e-5 little more is left than what the sum rounds off. Where zeros are right zeros have no error, and
    anything else an infinite one.
    """
    value, exact = value.double(), exact.double()
    rms, scale = ((t.square().mean().sqrt()) for t in (value - exact, exact))
    if base is not None:
        scale = torch.maximum((exact - base).square().mean().sqrt(), scale * torch.finfo(torch.float64).eps / FORMULA)
    return (rms / scale).item() if scale else (0.0 if rms == 0 else float("inf") if rms == rms else float("nan"))


def error_ratio(out: Tensor, ref: Tensor, low: Tensor) -> float:
    """rms(out - ref) / rms(low - ref) where all are finite: how far off `out` is, as a multiple of the stock operator.

    Returns:
        inf where `out` breaks clause 0 of `accept` or has an error and `low` has none; 1 where neither has one.
    """
    if _contract_faults(out, ref, low):
        return float("inf")
    finite, _, e_out, e_low, _ = _errors(out, ref, low)
    rms_out, rms_low = (_rms(t, finite).item() for t in (e_out, e_low))
    if rms_low == 0:
        return 1.0 if rms_out == 0 else float("inf")
    return rms_out / rms_low


def _contract_faults(out: Tensor, ref: Tensor, low: Tensor) -> list[str]:
    if ref.dtype != torch.float64:
        raise ValueError(f"ref must be float64, got {ref.dtype}")
    if ref.shape != low.shape:
        raise ValueError(f"ref {list(ref.shape)} and low {list(low.shape)} must have the same shape")
    faults = [
        f"0: {name} {got}, expected {expected}"
        for name, got, expected in (
            ("shape", list(out.shape), list(low.shape)),
            ("dtype", out.dtype, low.dtype),
            ("device", out.device, low.device),
        )
        if got != expected
    ]
    if not faults:
        rounded = ref.detach().to(low.device, low.dtype)
        for name, mask in (("NaN", torch.isnan), ("+Inf", torch.isposinf), ("-Inf", torch.isneginf)):
            differs = mask(out) != mask(rounded)
            if differs.any():
                faults.append(
                    f"0: {name} in {int(mask(out).sum())} places, expected {int(mask(rounded).sum())}; first "
                    f"difference at {_index(differs.flatten().int().argmax(), out.shape)}"
                )
    return faults


def _errors(out: Tensor, ref: Tensor, low: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, list[str]]:
    """As rows: where all is finite; there, ref, |out - ref|, |low - ref|. And the faults of the yardstick."""
    shape = (-1, ref.shape[-1]) if ref.dim() else (1, 1)
    out, low, ref = (t.detach().double().to(out.device).reshape(shape) for t in (out, low, ref))
    finite = out.isfinite()
    faults = [] if (low.isfinite() | ~finite).all() else ["D: no yardstick: stock is not finite where ref is"]
    finite = finite & low.isfinite()
    ref, e_out, e_low = (t.where(finite, 0.0) for t in (ref, (out - ref).abs(), (low - ref).abs()))
    return finite, ref, e_out, e_low, faults


def _rms(rows: Tensor, finite: Tensor, dim: int | None = None) -> Tensor:
    return (rows.square().sum(dim) / finite.sum(dim).clamp(min=1)).sqrt()


def _eps(dtype: torch.dtype) -> float:
    if dtype not in RMS_RATIO:
        raise ValueError(f"the rule has constants for {sorted(map(str, RMS_RATIO))}, got {dtype}")
    return torch.finfo(dtype).eps


def _index(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape)) if shape else ()


def _raise(faults: list[str], what: str, dtype: torch.dtype) -> None:
    if faults:
        raise NotAccepted("\n  ".join([f"{what or 'result'} ({dtype}) not accepted:", *faults]))
