"""Whether results are right: held to `vitfast.check.acceptance`, by the truth in fp64 and the yardstick's error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vitfast.check import acceptance
from vitfast.check.case import DTYPES, Case, Tensors
from vitfast.measure.device import first_line


class Judge:
    """Judges the variants of one case by their results on one set of inputs.

    The first `check_images` images are what is judged: of results that come image by image, in the full batch; of
    others, such as gradients of weights, in a batch cut to these images. So a variant that compiles for one shape has
    to be able to compile for two.

    A whole model with fewer images than that is judged on further sets as well: the error of one image's logits is a
    handful of numbers' luck, up to a quarter of it for models that are equally exact.

    Args:
        inputs: the set; copies of its first images are kept.
        more: further sets for a whole model, see `sets_to_judge`.

    Attributes:
        low: the yardstick's results, as `judged` returns them; to be set.
        no_measure: why nothing can be judged while the truth or `low` is missing.
    """

    def __init__(self, case: Case, inputs: Tensors, more: Sequence[Tensors] = ()) -> None:
        self.case, self.more = case, more
        self.images = min(case.check_images, case.batch)
        self.cut = tuple(t.detach().clone() for t in case.cut(inputs, self.images))
        self.low: list[Tensor] | None = None
        self.truth: list[Tensor] | None = None
        self.no_measure = "the yardstick has no result"
        try:
            judged = [torch.cat(each) for each in zip(self.cut, *more, strict=True)] if more else self.cut
            self.truth = _tensors(case.reference(*(t.double() if t.is_floating_point() else t for t in judged)))
        except Exception as problem:
            self.no_measure = f"the reference failed: {first_line(problem)}"

    def is_changed(self, inputs: Tensors) -> bool:
        """Whether `inputs` are no longer what they were."""
        return any(not torch.equal(a, b) for a, b in zip(self.case.cut(inputs, self.images), self.cut, strict=True))

    def judged(self, function: Callable[..., Any], results: Any) -> list[Tensor]:
        """Copies of what is judged of `function`, whose results on the full batch are `results`.

        Raises:
            ValueError: another number of results than the case has.
        """
        case, results = self.case, _tensors(results)
        if len(results) != len(case.per_image):
            raise ValueError(f"results must be {len(case.per_image)}, got {len(results)}")
        if case.batch == self.images:
            further = [_tensors(function(*each)) for each in self.more]
            return [torch.cat(each) for each in zip(results, *further, strict=True)]
        picked = [r[: self.images].clone() if by else None for r, by in zip(results, case.per_image, strict=True)]
        if not all(case.per_image):
            smaller = _tensors(function(*self.cut))
            picked = [s.clone() if p is None else p for p, s in zip(picked, smaller, strict=True)]
        return picked

    def judge(self, outs: list[Tensor], ours: bool, tolerance: float | None = None) -> tuple[dict[str, Any], str]:
        """`accepted` and `error_ratio` of a row, and why it is not accepted or "".

        A tolerance, which `Variant` explains, is held to in place of the rule. `error`, the rms error of the worst
        result, and `cosine`, that of the image whose results are furthest from fp64's, are then told in place of the
        ratio.
        """
        if self.low is None or self.truth is None:
            return {"accepted": None, "error_ratio": None}, self.no_measure
        refs, lows = self.truth, self.low
        if not ours:
            # in which dtype and where a rival returns its results is its own affair
            outs = [out.to(low.device, low.dtype) for out, low in zip(outs, lows, strict=True)]
        if tolerance is not None:
            error, cosine = acceptance.distance(outs, refs)
            found = {"error": error, "cosine": cosine}
        else:
            found = {"error_ratio": max(acceptance.error_ratio(*each) for each in zip(outs, refs, lows, strict=True))}
        try:
            if tolerance is not None:
                acceptance.accept_coarse(outs, refs, tolerance)
            else:
                self._accept(outs, refs, lows)
        except acceptance.NotAccepted as fault:
            return {"accepted": False} | found, " ".join(str(fault).split())[:1000]
        return {"accepted": True} | found, ""

    def _accept(self, outs: list[Tensor], refs: list[Tensor], lows: list[Tensor]) -> None:
        case = self.case
        if case.kind == "op":
            dtype = DTYPES[case.dtype]
            if case.device.type == "cuda":
                dtype = acceptance.dtype_to_judge_by(dtype, convolution="patch_embed" in case.name)
            acceptance.accept_results(outs, refs, lows, dtype=dtype, grad=case.mode != "forward")
        elif len(outs) == 1:
            acceptance.accept_model(outs[0], refs[0], lows[0])
        else:
            acceptance.accept_stages(*({str(i): t for i, t in enumerate(each)} for each in (outs, refs, lows)))


def sets_to_judge(case: Case, inputs: Tensors) -> int:
    """How many sets like `inputs` it takes to see `check_images` images of a whole model's inference."""
    by_image = all(case.per_image) and all(t.dim() > 0 and len(t) == case.batch for t in inputs)
    return -(-case.check_images // case.batch) if case.kind != "op" and by_image else 1


def _tensors(results: Any) -> list[Tensor]:
    return [torch.as_tensor(r).detach() for r in (results if isinstance(results, (tuple, list)) else (results,))]
