"""Why two models differ: which substitution in one of them gives the other one's values.

Each stage is looked at on its own, run by both models from one value. The first that differs is explained by a
substitution, or by two; it stays in place, and the next stage that differs is looked at.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from vitfast.check.acceptance import FORMULA, rounded_anew
from vitfast.parity.cases import Case, Side, cases_in_dtype, cases_of, off
from vitfast.parity.findings import Diagnosis, Finding, Step
from vitfast.parity.substitutions import TABLE, precision
from vitfast.parity.substitutions.substitution import Blocks, Substitution
from vitfast.parity.variant import Variant, canonical, kinds_between
from vitfast.weights.names import own_weights

# so many differences are looked for one after the other
ROUNDS = 6
# so long pairs are tried: where several stages are seen as one there are thousands
SECONDS = 60
# models of which so many stages can't be explained have other weights, and pairs are not tried any more
GIVEN_UP = 1
# what rewrites the same rows, where it counts which comes first
IN_ORDER = ("qkv order", "head split", "heads")
# of which there is one in a model
ALONE = ("eps", "gelu", "qkv order", "heads", "resampling", "mean and std", "pooling")
# a rounding explains what a stage is off by where this share of it is left: at most a few numbers fall on the other
# side of a boundary, because fp64 and the dtype come there with different last bits
LEFT = 0.25
# a difference that was folded into weights, as mean and std can be, leaves their rounding: at most this share of it
FOLDED = 1e-3
# (side, substitutions, how far apart the two are with them)
Tried = tuple[int, Sequence["Substitution"], float]


@torch.no_grad()
def diagnosis(a: Side, b: Side, images: Tensor, dtype: torch.dtype, labels: tuple[str, str]) -> Diagnosis:
    """Which substitutions make the two agree.

    Args:
        a: a model that can be run from its stages, see `cases_of`; b: the other.
        labels: what they are called in the result.
    """
    notes: list[str] = []
    cases = cases_of(a, b, images, dtype)
    if not cases or not a.chain.stages:
        return Diagnosis((), (), ("there are no stages that both can be run from",))
    variants = [_canonical(side, label, images, notes) for side, label in zip((a, b), labels, strict=True)]
    rounded = rounded_anew(dtype)
    search = Search(cases, variants, labels, notes, rounded)
    if b.exact is not None and not search.deviating(*variants):
        # the formulas agree, so that it is arithmetic
        search = Search(cases_in_dtype(a, b, images, dtype), variants, labels, notes, rounded)
        search.round()
        return Diagnosis(tuple(search.findings), (), tuple(notes))
    for _ in range(ROUNDS):
        if not search.round():
            break
    search.weights()
    left = tuple(cases[i].stage for i in search.deviating(*search.variants))
    return Diagnosis(tuple(search.findings), left, tuple(notes) if left else ())


def _canonical(side: Side, label: str, images: Tensor, notes: list[str]) -> Variant | None:
    if side.exact is None:
        return None
    try:
        return canonical(side.exact, images.double())
    except (ValueError, RuntimeError, NotImplementedError, TypeError, AttributeError) as error:
        notes.append(f"{label} cannot be varied: {str(error).splitlines()[0]}")
        return None


class Search:
    """The state of a diagnosis.

    Attributes:
        cases: values that both models were run on.
        variants: both as they are varied so far; None where one cannot be.
        findings: so far.
    """

    def __init__(
        self, cases: list[Case], variants: Sequence[Variant | None], labels: tuple[str, str], notes: list[str],
        rounded: float,
    ):  # fmt: skip
        self.cases, self.labels, self.notes = cases, labels, notes
        self.variants: list[Variant | None] = list(variants)
        self.changed = [False, False]
        self.findings: list[Finding] = []
        self.given_up: set[int] = set()
        # what rounding of weights may leave, and for how long pairs may be tried yet
        self.rounded, self.seconds = rounded, float(SECONDS)
        self.rounding = any(case.rounding for case in cases)
        # a variant stands for its model where it gives its values
        self.trusted = [self._trusted(0), self._trusted(1)]

    def _trusted(self, side: int) -> set[int]:
        variant = self.variants[side]
        if variant is None:
            return set()
        found = set()
        for i, case in enumerate(self.cases):
            held = (case.a, case.b)[side]
            if held is None or (self.rounding and side == 1):
                continue
            if off(variant.span(case.start, case.stage, case.x), held, case.base) <= max(FORMULA, case.own_bound):
                found.add(i)
        return found

    def values(self, i: int, a: Variant | None, b: Variant | None) -> tuple[Tensor | None, Tensor | None]:
        case, values = self.cases[i], []
        for side, variant in enumerate((a, b)):
            held = (case.a, case.b)[side]
            as_it_is = variant is None or i not in self.trusted[side] or not self._changed(side, variant)
            values.append(held if as_it_is else variant.span(case.start, case.stage, case.x))  # type: ignore[union-attr]
        return values[0], values[1]

    def _changed(self, side: int, variant: Variant) -> bool:
        return self.changed[side] or variant is not self.variants[side]

    def apart(self, i: int, a: Variant | None, b: Variant | None) -> float:
        first, second = self.values(i, a, b)
        return off(second, first, self.cases[i].base)

    def deviating(self, a: Variant | None, b: Variant | None) -> list[int]:
        return [i for i, case in enumerate(self.cases) if not self.apart(i, a, b) <= case.bound]

    def round(self) -> bool:
        """Explain the first stage that differs; False where there is none left that can be."""
        left = [i for i in self.deviating(*self.variants) if i not in self.given_up]
        if not left:
            return False
        i = left[0]
        before = self.apart(i, *self.variants)
        sides = [side for side in ((0,) if self.rounding else (0, 1)) if i in self.trusted[side]]
        tried: list[Tried] = []
        for tries in (self._singles, self._pairs):
            for side in sides:
                found = tries(i, side)
                tried += found
                if explained := self._explaining(found, LEFT * before if self.rounding else self.cases[i].bound):
                    self._choose(i, before, explained)
                    return True
        # weights that somebody folded the difference into are rounded anew
        if explained := self._explaining(tried, min(self.rounded, FOLDED * before)):
            self._choose(i, before, explained)
            self.cases[i] = self.cases[i]._replace(bound=self.rounded)
        else:
            self.given_up.add(i)
        return True

    def _candidates(self, i: int, side: int) -> list[Substitution]:
        variant, case = self.variants[side], self.cases[i]
        if self.rounding:
            return precision(case.stage)
        kinds = dict.fromkeys(kind for kind, _ in kinds_between(variant, case.start, case.stage))  # type: ignore[arg-type]
        # the likeliest of each kind, then the next of each
        by_kind = itertools.zip_longest(*(TABLE[kind](variant) for kind in kinds))  # type: ignore[arg-type]  # trusted
        found = [each for row in by_kind for each in row if each is not None]
        return [*{(each.name, each.what): each for each in found}.values(), *precision(case.stage)]

    def _blocks(self, i: int, side: int) -> list[int]:
        case = self.cases[i]
        kinds = kinds_between(self.variants[side], case.start, case.stage)  # type: ignore[arg-type]  # trusted
        return sorted({block for _, block in kinds if block is not None})

    def _singles(self, i: int, side: int) -> list[Tried]:
        blocks = self._blocks(i, side)
        candidates = self._candidates(i, side)
        return [(side, (each,), self._try(i, side, [each], blocks)) for each in candidates]

    def _pairs(self, i: int, side: int) -> list[Tried]:
        if self.rounding or len(self.given_up) > GIVEN_UP:
            return []
        blocks = self._blocks(i, side)
        candidates = [each for each in self._candidates(i, side) if each.name != "precision"]
        pairs, tried, bound = _pairs_of(candidates), [], self.cases[i].bound
        for pair in pairs:
            began = time.monotonic()
            if self.seconds <= 0:
                stage = self.cases[i].stage
                self.notes.append(f"{stage}: of {len(pairs)} pairs of substitutions {len(tried)} were tried")
                break
            tried.append((side, pair, self._try(i, side, pair, blocks)))
            # what explains it as well has less time
            self.seconds -= (time.monotonic() - began) * (6 if tried[-1][2] <= bound else 1)
        return tried

    def _explaining(self, tried: list[Tried], bound: float) -> list[Tried]:
        good = [each for each in tried if each[2] <= bound]
        # where a bound is wide, as it is without fp64, what leaves twice as much as the best is no explanation
        best = min((left for *_, left in good), default=0.0)
        return [each for each in good if each[2] <= max(2 * best, FORMULA)]

    def _with(self, side: int, steps: Sequence[Substitution], blocks: Blocks, only: Blocks = None) -> Variant | None:
        """The variant of one side with these steps, made in `blocks` where they can be; its others are shared."""
        variant = self.variants[side].copy(only)  # type: ignore[union-attr]  # trusted
        for step in steps:
            try:
                changed = step.change(variant, blocks if step.by_block and blocks else None)
            except ValueError:
                # a combination that no config has, a grid that a mode can't resample
                return None
            if changed is None:
                return None
            variant = changed
        return variant

    def _try(self, i: int, side: int, steps: Sequence[Substitution], blocks: list[int]) -> float:
        # a change of all norms is made in a whole copy
        only = None if not blocks and any(step.by_block for step in steps) else blocks
        changed = self._with(side, steps, blocks, only)
        if changed is None:
            return float("inf")
        pair = (changed, self.variants[1]) if side == 0 else (self.variants[0], changed)
        return self.apart(i, *pair)

    def _choose(self, i: int, before: float, explained: list[Tried]) -> None:
        """Of what explains stage `i` that which leaves the fewest stages, made everywhere or in these blocks only."""
        ranked = []
        for side, steps, _ in explained:
            own = self._blocks(i, side)
            scopes: list[tuple[str, Blocks]] = [("", None)]
            if any(step.by_block for step in steps):
                whole = range(len(self.variants[side].model.blocks))  # type: ignore[union-attr]  # trusted
                scopes += [(" in the blocks only", list(whole))]
                scopes += [(f" in blocks.{own[0]} only", own)] if own else []
            for told, blocks in scopes:
                changed = self._with(side, steps, blocks)
                if changed is None:
                    continue
                pair = (changed, self.variants[1]) if side == 0 else (self.variants[0], changed)
                left = self.deviating(*pair)
                said = tuple(
                    Step(self.labels[side], step.name, step.what + step.scope + (told if step.by_block else ""))
                    for step in steps
                )
                ranked.append((len(left), len(ranked), said, side, changed, [step.what for step in steps]))
                if not left:
                    break
        fewest = min(each[0] for each in ranked)
        best = [each for each in ranked if each[0] == fewest]
        _, _, _, side, changed, _ = best[0]
        self.variants[side], self.changed[side] = changed, True
        after = self.apart(i, *self.variants)
        # the widest scope of each
        found = {tuple(what): said for _, _, said, _, _, what in reversed(best)}
        alternatives = tuple(reversed(found.values()))
        self.findings.append(Finding(self.cases[i].stage, alternatives, before, after))

    def weights(self) -> None:
        """Name the weights that differ where nothing else explains a stage, if they do explain it."""
        a, b = self.variants
        left = [i for i in self.deviating(a, b) if i in self.trusted[0] and i in self.trusted[1]]
        if not left or a is None or b is None:
            return
        ours, theirs = own_weights(a.model), own_weights(b.model)
        differ = [
            name for name, w in ours.items()
            if name in theirs and theirs[name].shape == w.shape and not torch.equal(theirs[name], w)
        ]  # fmt: skip
        here = [name for name in differ if any(_belongs(name, self.cases[i].stage) for i in left)]
        if not here:
            return
        i, changed = left[0], a.copy()
        for name in here:
            holder, _, last = name.rpartition(".")
            changed.model.get_submodule(holder)._parameters[last] = theirs[name]  # type: ignore[assignment]
        before = self.apart(i, a, b)
        after = self.apart(i, changed, b)
        if after <= self.cases[i].bound:
            self.variants[0], self.changed[0] = changed, True
            told = f"{self.labels[1]}'s {', '.join(here[:4])}" + f" and {len(here) - 4} more" * (len(here) > 4)
            broken = [name for name in here if not theirs[name].isfinite().all()]
            told += f", with NaN or Inf in {', '.join(broken[:4])}" if broken else ""
            step = Step(self.labels[0], "weights", told)
            self.findings.append(Finding(self.cases[i].stage, ((step,),), before, after))


def _pairs_of(candidates: list[Substitution]) -> list[tuple[Substitution, Substitution]]:
    """Of two different things, the likelier ones first; in both orders where that makes a difference."""
    found = []
    for (i, first), (j, second) in itertools.combinations(enumerate(candidates), 2):
        if first.name == second.name and first.name in ALONE:
            continue
        found.append((i + j, first, second))
        if first.name in IN_ORDER and second.name in IN_ORDER:
            found.append((i + j, second, first))
    return [(first, second) for _, first, second in sorted(found, key=lambda each: each[0])]


def _belongs(weight: str, stage: str) -> bool:
    """Whether a stage reads this weight."""
    if stage.startswith("blocks."):
        block = stage.rpartition(".")[0]
        parts = ("norm1", "attn", "ls1") if stage.endswith("attn") else ("norm2", "mlp", "ls2")
        return any(weight.startswith(f"{block}.{part}") for part in parts)
    names = {
        "patches": ("patch_embed.",), "patch_tokens": ("pos_embed", "cls_token", "reg_token", "dist_token", "norm_pre"),
        "tokens": ("norm.",), "pooled": ("fc_norm.", "attn_pool."), "logits": ("head",),
    }  # fmt: skip
    return weight.startswith(names[stage])
