"""Which classes of other libraries vitfast knows, and what an op reads of them.

A class is known by its name and by its forward: the digest of the code that was read and tested (`digests.json`).
Where another version of a library has another forward, the class is unknown there and runs as it is.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from vitfast.model.layers import activation_name, norm_kind
from vitfast.model.plain import FORWARDS, stands_for

# what a child may be for -> the roles of `Known` that do; ABSENT: there may be nothing
ABSENT = ""
USES = {
    **dict.fromkeys(("norm", "norm1", "norm2"), ("norm",)),
    **dict.fromkeys(("q_norm", "k_norm", "inner_norm"), ("norm", "identity")),
    **dict.fromkeys(("qkv", "q", "k", "v", "fc1", "gate", "value", "fc2"), ("linear",)),
    "proj": ("linear", "identity"),
    **dict.fromkeys(("attn_drop", "proj_drop", "mid_drop", "drop", "drop1", "drop2"), ("dropout", "identity")),
    **dict.fromkeys(("scale1", "scale2"), ("scale", "identity")),
    **dict.fromkeys(("drop_path1", "drop_path2"), ("drop_path", "identity")),
    "act": ("activation",),
    "softmax": ("softmax",),
    "sequence": ("sequence",),
    "attn": ("attention",),
    "mlp": ("mlp",),
    "output_gate": (ABSENT,),
}


class Known:
    """What vitfast knows of a class.

    Attributes:
        role: 'block', 'attention', 'mlp', 'patch_embed', or which part of these it can be.
        children: of a block, attention or MLP: what a child is for -> its name, dotted where it lies deeper.
        read: what an op takes of a module: of a norm 'layer' or 'rms', of an activation its name in `ops`, of a scale
            its gamma, of a drop path its rate, of an attention its `Heads`, of an MLP whether fc1 gives gate and value.
        why_not: why this one module is not what an op computes, '' where it is; None: there is nothing to ask.
        forward: of a block or attention, the function that runs in place of its class's forward.
        calls: names of functions, of its class or module, that the forward calls: their code is in the digest too.
        layers: of a class that runs many blocks, the name of the list of them; `children` are those of each.
        why_not_alone: of an attention with a `forward`, why it runs no ops where its block has to call it.
        paths: `children` as they are read at each call: (use, names from the outside, roles).
        branches: of a block, the same of its 'attn' and its 'mlp', with 'drop' for 'drop1' or 'drop2' and so on.
    """

    def __init__(
        self,
        role: str,
        children: Mapping[str, str] | None = None,
        read: Callable[[Any], Any] = type,
        why_not: Callable[[Any], str] | None = None,
        forward: Any = None,
        calls: tuple[str, ...] = (),
        layers: str = "",
        why_not_alone: Callable[[Any], str] | None = None,
    ):
        self.role, self.children, self.read, self.why_not = role, children or {}, read, why_not
        self.forward, self.calls, self.layers, self.why_not_alone = forward, calls, layers, why_not_alone
        self.paths = [(use, name.split("."), USES[use]) for use, name in self.children.items()]
        self.branches = {
            part: [(use.rstrip("12"), *rest) for use, *rest in self.paths if use == part or use[-1] == number]
            for part, number in (("attn", "1"), ("mlp", "2"))
        }


def _softmax_why_not(module: nn.Softmax) -> str:
    return "" if module.dim in (-1, 3) else f"has dim {module.dim}, not -1"


def norm_why_not(module: Any) -> str:
    """Of a norm of torch, or one that has its `normalized_shape`: ops compute it over the channels alone."""
    shape = module.normalized_shape
    return "" if len(shape) == 1 else f"normalizes over {len(shape)} dims, not 1"


# by class: what torch has, and what `learn` has found in models
KNOWN: dict[type, Known] = {
    nn.Linear: Known("linear"),
    nn.modules.linear.NonDynamicallyQuantizableLinear: Known("linear"),
    nn.LayerNorm: Known("norm", read=norm_kind, why_not=norm_why_not),
    nn.RMSNorm: Known("norm", read=norm_kind, why_not=norm_why_not),
    nn.Dropout: Known("dropout"),
    nn.Identity: Known("identity"),
    nn.GELU: Known("activation", read=activation_name),
    nn.SiLU: Known("activation", read=activation_name),
    nn.Softmax: Known("softmax", why_not=_softmax_why_not),
    nn.Conv2d: Known("conv"),
    nn.Sequential: Known("sequence"),
    nn.ModuleList: Known("sequence"),
}
stands_for(nn.modules.linear.NonDynamicallyQuantizableLinear, nn.ModuleList)
# of classes with `Known.calls`: (what has the function: the class's own names, or its module's; name, function)
CALLED: dict[type, list[tuple[Mapping, str, Callable]]] = {}
# by 'module.Class': what the modules of `families` say of other libraries
LIBRARIES: dict[str, Known] = {}


@functools.cache
def digests() -> dict[str, list[str]]:
    """'module.Class' -> digests of the forwards that were tested."""
    return json.loads((Path(__file__).parent / "digests.json").read_text())


def name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def class_of(module: nn.Module) -> type:
    """Its class, or where FSDP2 or `replicate` has put a class of its own on it the one below."""
    kind = type(module)
    if len(kind.__bases__) == 2 and kind.__bases__[0].__module__.startswith("torch.distributed."):
        below = kind.__bases__[1]
        # transformers wraps the forward of each class that is made of one of its layers
        return below if inspect.unwrap(kind.forward) is inspect.unwrap(below.forward) else kind
    return kind


def digest_of(kind: type, known: Known) -> str:
    """Of the code of its forward and of what that calls, without comments, docstrings and annotations.

    Raises:
        OSError: there is no source to read.
    """
    texts = [_code(inspect.unwrap(kind.forward)), *(_code(function) for _, _, function in _called(kind, known))]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _called(kind: Any, known: Known) -> list[tuple[Mapping, str, Callable]]:
    own, names = vars(kind), inspect.unwrap(kind.forward).__globals__
    return [(own if name in own else names, name, (own if name in own else names)[name]) for name in known.calls]


def still_calls(kind: type) -> bool:
    """Whether the functions that its forward calls are those that were read."""
    return all(names.get(name) is function for names, name, function in CALLED.get(kind, ()))


def _code(function: Callable) -> str:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns, node.decorator_list = None, []
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def learn(kind: type) -> str:
    """Note what is known of a class; the reason for which nothing is, '' for none."""
    if kind in KNOWN:
        return ""
    name = name_of(kind)
    known = LIBRARIES.get(name)
    if known is None:
        return f"is {name}, which vitfast does not know"
    try:
        found = digest_of(kind, known)
    except (OSError, TypeError, SyntaxError, KeyError):
        return f"is {name}, whose source is not there to be compared with the one that was tested"
    if found not in digests().get(name, ()):
        return f"is {name} with a forward that was not tested: of another version, or patched"
    FORWARDS[kind] = kind.forward
    if known.calls:
        CALLED[kind] = _called(kind, known)
    KNOWN[kind] = known
    return ""
