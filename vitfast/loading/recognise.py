"""Whose weights these are: by their names and shapes, never by the name of a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.layout import Facts, Known, Layout, View, views
from vitfast.weights.layouts.refused import refused


class Recognised(NamedTuple):
    """A library's weights among those of a file.

    Attributes:
        layout: whose they are; why: in words.
        prefix: what stands before their names.
        view: the weights as seen from there.
    """

    layout: Layout
    why: str
    prefix: str
    view: View


def _why(layout: Layout, view: View, facts: Facts) -> str | None:
    try:
        return layout.recognises(view, facts)
    except IndexError:
        # a weight without the dimensions that tell
        return None


def described(found: Recognised, facts: Facts, given: Mapping[str, Any]) -> Known:
    """The model that these weights are of.

    Raises:
        ValueError: a weight has another number of dimensions than the library's; or as `Layout.describe`.
        NotImplementedError: as `Layout.describe`.
    """
    try:
        return found.layout.describe(found.view, facts, given)
    except (IndexError, ValueError) as error:
        # of a shape that was taken apart
        if isinstance(error, IndexError) or "to unpack" in str(error):
            whose = found.layout.whose
            raise ValueError(f"a weight has not the number of dimensions that it has in {whose} ({error})") from error
        raise


def recognise(state: Mapping[str, Tensor], facts: Facts, as_: str | None = None) -> Recognised:
    """The first layout that knows these weights.

    Args:
        as_: the name of a layout, in place of all.

    Raises:
        ValueError: nobody's weights that are known, not those of `as_`, or those of several models.
        NotImplementedError: weights of a model that no ViTConfig describes; names what is missing.
    """
    known = [layout for layout in LAYOUTS if as_ in (None, layout.name)]
    if not known:
        raise ValueError(f"as_ must be one of {', '.join(layout.name for layout in LAYOUTS)}, got {as_!r}")
    # of a layout that was asked for its own error says what does not fit
    if as_ is None and (other := refused(state, told=bool(facts.fields))) is not None:
        hint = "; as_='timm' reads them as a ViT without that" if other.hidden else ""
        raise NotImplementedError(f"these are weights of {other.whose}: ViTConfig does not have {other.lacks}{hint}")
    for layout in known:
        found = [
            Recognised(layout, why, prefix, view)
            for prefix, view in views(layout, state)
            if (why := _why(layout, view, facts)) is not None
        ]
        if len(found) > 1:
            places = ", ".join(repr(each.prefix.rstrip("./")) for each in found)
            raise ValueError(f"there are {len(found)} models of {layout.whose}, under {places}: choose one with key=")
        if found:
            return found[0]
    names = ", ".join([*state][:4])
    whose = f"those of {known[0].whose}" if as_ else "those of a ViT in any layout that is known"
    raise ValueError(f"weights must be {whose}, got {len(state)} with names such as {names or '(none)'}")
