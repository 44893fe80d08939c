"""Files of weights, whoever wrote them: which of what is in them are the weights, and under which names."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from torch import Tensor
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from vitfast.checkpoints.arrays import is_npz, read_arrays
from vitfast.checkpoints.facts import Facts, facts_of
from vitfast.checkpoints.files import INDEX, file_of, is_safetensors, read_json, shards_of
from vitfast.checkpoints.pickled import load_pickled
from vitfast.checkpoints.unpickler import Unread
from vitfast.weights.names import rename_keys, without_wrappers

# what training scripts and wrappers call the model that they hold
NAMED = (
    "model.", "net.", "network.", "backbone.", "encoder.", "student.", "teacher.", "vit.", "timm_model.", "ema_model.",
    "_forward_module.",
)  # fmt: skip
COUNTER = "n_averaged"  # of torch's AveragedModel, no weight
# averaged weights first, as timm's loader takes them
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")
# of what stands in a file, how much an error names
NAMES = 8


class Read(NamedTuple):
    """Weights of a file, and which of those in it they are.

    Attributes:
        state: the tensors by their names, on the CPU. Whoever copies them pops each, and has it freed.
        file: the one that was read.
        chosen: the names under which they stood in it, 'model_ema.state_dict'; '' where nothing stood beside them.
        others: weights that stood beside them and were passed over: 'state_dict'.
    """

    state: dict[str, Tensor]
    file: Path
    chosen: str
    others: tuple[str, ...]

    @property
    def facts(self) -> Facts:
        """What config files beside the file say; `read_checkpoint` does not ask, since they may be somebody else's.

        Raises:
            ValueError: as `facts_of`.
        """
        return facts_of(self.file)


def read(path: str | os.PathLike, *, allow_pickle: bool = False, key: str | None = None, mapped: bool = True) -> Read:
    """The weights of a file, as `read_checkpoint` has them, and what is known of them.

    Args:
        mapped: tensors are views of the file where its format allows it, so that they take no memory, and are right
            as long as nobody writes into it. safetensors are in any case.

    Raises:
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    given, path = path, file_of(path)
    content, unread = _content(path, allow_pickle, given, mapped)
    state, prefix, chosen, others = _weights(path, content, key)
    del content
    if not isinstance(state, Mapping) or (isinstance(state, Unread) and not state):
        wrong = f"a {type(state).__name__}; of a model save the state_dict()"
    else:
        strange = [f"{k!r}: {type(v).__name__}" for k, v in state.items() if not _is_entry(k, v, unread)]
        wrong = _named(strange)
    if wrong:
        raise ValueError(f"read_checkpoint: {str(path)!r} must hold a flat mapping of names to tensors, got {wrong}")
    state = _part(state, "")
    if prefix and not any(name.startswith(f"{prefix}.") for name in state):
        there = sorted({name.partition(".")[0] for name in state})
        raise ValueError(f"read_checkpoint: {str(path)!r} has nothing under key={key!r}, only {_named(there)}")
    if prefix:
        state, chosen = _part(state, f"{prefix}."), f"{chosen}.{prefix}".removeprefix(".")
    while (common := next((n for n in NAMED if state and all(name.startswith(n) for name in state)), None)) is not None:
        state = _part(state, common)
    return Read(state, path, chosen, others)


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES]) + f" and {len(names) - NAMES} more" * (len(names) > NAMES)


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """What stands under the prefix, without it."""
    inside = OrderedDict(
        (name, value)
        for name, value in state.items()
        if name.startswith(prefix) and without_wrappers(name[len(prefix) :]) != COUNTER
    )
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        vars(inside)["_metadata"] = {module: v for module, v in versions.items() if f"{module}.".startswith(prefix)}
    return rename_keys(inside, lambda name: without_wrappers(name[len(prefix) :]))


def _content(path: Path, allow_pickle: bool, given: str | os.PathLike, mapped: bool) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether stand-ins may be in it. given: the path that was asked for.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a pickled file without `allow_pickle`, a damaged one, or one of another kind.
    """
    if not path.stat().st_size:
        raise ValueError(f"read_checkpoint: {str(path)!r} is empty")
    if path.name.endswith(INDEX):
        return _shards(path, allow_pickle, given, mapped)
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: _aligned(file.get_tensor(key)) for key in file.keys()}, False  # noqa: SIM118  (not a dict)
        except Exception as error:
            raise ValueError(
                f"read_checkpoint: {str(path)!r} is not a whole safetensors file: {type(error).__name__}: {error}"
            ) from error
    if path.suffix == ".npz" or is_npz(path):
        try:
            return read_arrays(path), False
        except Exception as error:  # a damaged or hostile file can raise anything
            raise ValueError(
                f"read_checkpoint: {str(path)!r} is not a whole npz file of weights: {type(error).__name__}: {error}"
            ) from error
    if path.suffix == ".npy":
        raise ValueError(f"read_checkpoint: {str(path)!r} is one array; weights by their names are in an .npz file")
    if not allow_pickle:
        raise ValueError(
            f"read_checkpoint: path must be a .safetensors or .npz file, got {os.fspath(given)!r} ({path.name}); a "
            "pickled file can be read with load_checkpoint(model, path, allow_pickle=True) if you trust where it comes "
            "from"
        )
    try:
        return load_pickled(path, mapped=mapped)
    except Exception as error:  # as above
        raise ValueError(
            f"read_checkpoint: {str(path)!r} is not a whole file of plain weights: {type(error).__name__}: {error}"
        ) from error


def _aligned(tensor: Tensor) -> Tensor:
    """The same, or a copy of a view that begins between two numbers, as after a header that no blanks fill up."""
    return tensor.clone() if tensor.data_ptr() % tensor.element_size() else tensor


def _shards(path: Path, allow_pickle: bool, given: str | os.PathLike, mapped: bool) -> tuple[dict[str, Any], bool]:
    state: dict[str, Any] = {}
    unread, files = False, shards_of(path)
    # after that, which says what is wrong with an index
    shard_of = read_json(path)["weight_map"]
    for file in files:
        shard, partly = _content(file, allow_pickle, given, mapped)
        if not isinstance(shard, Mapping):
            raise ValueError(f"read_checkpoint: {str(file)!r} must map names to tensors, got {type(shard).__name__}")
        # of a name in two shards the index knows which one is meant
        state |= {name: value for name, value in shard.items() if shard_of.get(name, file.name) == file.name}
        unread = unread or partly
    return state, unread


def _weights(path: Path, content: Any, key: str | None) -> tuple[Any, str, str, tuple[str, ...]]:
    """The state dict inside a checkpoint, what is left of the key, under which names it stood, and beside which."""
    prefix, taken, others = key or "", [], []
    while prefix and isinstance(content, Mapping):
        name, _, rest = prefix.partition(".")
        if not isinstance(content.get(name), Mapping):
            break
        taken.append(name)
        content, prefix = content[name], rest
    # bounded: a pickled mapping may contain itself
    for _ in WRAPPERS:
        if not isinstance(content, Mapping):
            break
        sets = [name for name, value in content.items() if _is_state(value)]
        wrapper = next((name for name in WRAPPERS if _holds_weights(content.get(name))), None)
        if wrapper is None and len(sets) > 1:
            none = f"nothing under key={key!r} but " if key else ""
            raise ValueError(
                f"read_checkpoint: {str(path)!r} holds {none}several sets of weights, {_named([*map(repr, sets)])}: "
                f"choose one with load_checkpoint(model, path, key={sets[0]!r}, ...)"
            )
        if wrapper is None and not sets:
            break
        name = sets[0] if wrapper is None else wrapper
        others += [".".join([*taken, str(other)]) for other in sets if other != name]
        taken.append(name)
        content = content[name]
    return content, prefix, ".".join(map(str, taken)), tuple(others)


def _holds_weights(content: Any, depth: int = len(WRAPPERS), seen: dict[int, int] | None = None) -> bool:
    """Whether a mapping has weights in it; numbers, as of an average's decay, are none."""
    # a pickle can name one mapping in a thousand places of another
    seen = {} if seen is None else seen
    if not isinstance(content, Mapping) or depth <= seen.get(id(content), 0):
        return False
    seen[id(content)] = depth
    values = content.values()
    return any(isinstance(v, Tensor) and v.dim() or _holds_weights(v, depth - 1, seen) for v in values)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_entry(k, v) for k, v in value.items())


def _is_entry(name: Any, value: Any, unread: bool = False) -> bool:
    # a module's extra state may be anything, but nothing of which a part was passed over
    extra = isinstance(name, str) and name.endswith(_EXTRA_STATE_KEY_SUFFIX) and not unread
    return isinstance(name, str) and (isinstance(value, Tensor) or extra)
