"""Checkpoints on disk: safetensors by default, pickled files only on request."""

from __future__ import annotations

import json
import os
import secrets
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from vitfast.checkpoints.described import config_of
from vitfast.checkpoints.files import INDEX, file_of, is_safetensors
from vitfast.checkpoints.pickled import Unread, load_pickled
from vitfast.config import ViTConfig
from vitfast.model.vit import ViT
from vitfast.weights.names import own_weights, rename_keys, without_wrappers

CONFIG_KEY = "vitfast_config"
# what training scripts and wrappers call the model that they hold
NAMED = (
    "model.", "net.", "network.", "backbone.", "encoder.", "student.", "teacher.", "vit.", "timm_model.", "ema_model.",
    "_forward_module.",
)  # fmt: skip
COUNTER = "n_averaged"  # of torch's AveragedModel, no weight
# averaged weights first, as timm's loader takes them
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def save_checkpoint(model: ViT, path: str | os.PathLike, *, layout: str = "timm", with_config: bool = True) -> None:
    """Write the model's weights and config as safetensors. An existing file is replaced only by a complete one.

    The config is that of the model as it is now, with what was exchanged in it since it was built, so that
    `ViT.from_config(read_config(path))` with these weights computes the same. It says nothing of how a model runs:
    dtype, train mode, gradient checkpointing, distilled training.

    Args:
        model: a ViT, or one wrapped by torch.compile, DataParallel or DDP.
        layout: names of the weights, 'timm' or 'vit_pytorch'.
        with_config: False writes the weights alone, of any model; whoever reads them has to build it.

    Raises:
        ValueError: the path does not end in .safetensors, vit-pytorch has no names for these weights, or the model
            has none here: it is on the meta device, or offloaded.
        FileNotFoundError: its folder does not exist.
        TypeError: no ViT.
        NotImplementedError: no ViTConfig describes what was made of the model: a hook, an adapter, a module of
            another class, an eps that only one norm has, weights that a state-dict hook leaves out or changes; names
            the parts. Nothing is written.
    """
    model, path = unwrapped(model), Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_checkpoint: path must end in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: no folder {str(path.parent)!r}")
    if not isinstance(model, ViT):
        raise TypeError(f"save_checkpoint: model must be a vitfast.ViT, got {type(model).__name__}")
    own = own_weights(model)
    absent = [key for key, value in own.items() if value.is_meta]
    if absent:
        raise ValueError(
            f"save_checkpoint: no values here for {', '.join(absent[:3])}{' and others' * (len(absent) > 3)}, on the "
            "meta device as of a model built there or offloaded"
        )
    state = model.state_dict(layout=layout)
    # without it accelerate and transformers refuse a file that has other metadata
    metadata = {"format": "pt"}
    if with_config:
        try:
            metadata |= {CONFIG_KEY: json.dumps(config_of(model).to_dict())}
        except NotImplementedError as error:
            raise NotImplementedError(
                f"save_checkpoint: {error}. with_config=False writes the weights alone; the model then has to be "
                "built as this one was"
            ) from None
        saved = nn.Module.state_dict(model)
        hooked = [key for key in own.keys() | saved.keys() if not _same(own.get(key), saved.get(key))]
        if hooked:
            raise NotImplementedError(
                f"save_checkpoint: a state-dict hook leaves out or changes {', '.join(sorted(hooked)[:3])}; "
                "with_config=False writes what it leaves"
            )
    foreign = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if foreign:
        raise NotImplementedError(f"save_checkpoint: safetensors holds tensors only, not {', '.join(foreign[:3])}")
    state = {key: value.detach().contiguous() for key, value in state.items()}
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        # safetensors makes files that only their owner can read; this one gets the mode that any new file has
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(state, temporary, metadata=metadata)
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _same(own: Any, saved: Any) -> bool:
    if not isinstance(own, Tensor) or not isinstance(saved, Tensor) or own.dtype != saved.dtype:
        return False
    return own.data_ptr() == saved.data_ptr() or torch.equal(own, saved.to(own.device))


def unwrapped(model: torch.nn.Module) -> Any:
    """The model inside the wrappers of torch.compile, DataParallel and DDP."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model


def read_checkpoint(
    path: str | os.PathLike, *, allow_pickle: bool = False, key: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU, without the prefixes of wrappers and training scripts.

    Taken off are those of DDP, torch.compile, FSDP and activation checkpointing, and a name such as `model.` where
    every key has it. Of a training checkpoint the weights: the averaged ones where it has both (`state_dict_ema`,
    `model_ema`), as timm does. Weights in shards are read from all of them.

    Args:
        path: a .safetensors file, or with `allow_pickle` a .pt, .pth, .pth.tar, .ckpt or .bin file; the
            .index.json of shards; a folder of transformers, accelerate or timm, whose model.safetensors is read where
            there is a pytorch_model.bin too.
        allow_pickle: read pickled files too (nothing that they name is run, and what is no tensor is passed over). Even
            so, only open files that you trust.
        key: of a file with several models the one to take, by its name in the file or before its keys: 'teacher',
            'teacher.backbone'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickled file without `allow_pickle`, no flat mapping of names to tensors inside, or several of
            them and no `key`; names what there is.
    """
    given, path = path, file_of(path)
    content, unread = _content(path, allow_pickle, given)
    state, prefix = _weights(path, content, key)
    if not isinstance(state, Mapping) or (isinstance(state, Unread) and not state):
        wrong = f"a {type(state).__name__}; of a model save the state_dict()"
    else:
        wrong = ", ".join(f"{k!r}: {type(v).__name__}" for k, v in state.items() if not _is_entry(k, v, unread))
    if wrong:
        raise ValueError(f"read_checkpoint: {str(path)!r} must hold a flat mapping of names to tensors, got {wrong}")
    state = _part(state, "")
    if prefix and not any(name.startswith(f"{prefix}.") for name in state):
        there = sorted({name.partition(".")[0] for name in state})
        raise ValueError(f"read_checkpoint: {str(path)!r} has nothing under key={key!r}, only {', '.join(there)}")
    if prefix:
        state = _part(state, f"{prefix}.")
    while (common := next((n for n in NAMED if state and all(name.startswith(n) for name in state)), None)) is not None:
        state = _part(state, common)
    return state


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


def _content(path: Path, allow_pickle: bool, given: str | os.PathLike) -> tuple[Any, bool]:
    """What the file holds, on the CPU, and whether stand-ins may be in it. given: the path that was asked for.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: a pickled file without `allow_pickle`, a damaged one, or one of another kind.
    """
    if path.name.endswith(INDEX):
        return _shards(path, allow_pickle, given)
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, False  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"read_checkpoint: {str(path)!r} is not a whole safetensors file: {error}") from error
    if path.suffix in (".npz", ".npy"):
        raise ValueError(
            f"read_checkpoint: {str(path)!r} holds numpy arrays, as JAX's ViTs do. timm reads them: "
            "model.load_state_dict(timm.create_model(name, checkpoint_path=path).state_dict())"
        )
    if not allow_pickle:
        raise ValueError(
            f"read_checkpoint: path must be a .safetensors file, got {os.fspath(given)!r} ({path.name}); a pickled "
            "file can be read with load_checkpoint(model, path, allow_pickle=True) if you trust where it comes from"
        )
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True), False
        except Exception as error:
            if "TorchScript" in str(error):
                raise ValueError("a TorchScript archive; save the state_dict() of torch.jit.load(path)") from None
        # there is more in it than weights
        return load_pickled(path)
    except Exception as error:  # a damaged or hostile file can raise anything
        raise ValueError(
            f"read_checkpoint: {str(path)!r} is not a whole file of plain weights: {type(error).__name__}: {error}"
        ) from error


def _shards(path: Path, allow_pickle: bool, given: str | os.PathLike) -> tuple[dict[str, Any], bool]:
    try:
        names = sorted(set(json.loads(path.read_text())["weight_map"].values()))
        files = [path.parent / name for name in names]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"read_checkpoint: {str(path)!r} is no index of shards: {error!r}") from error
    state: dict[str, Any] = {}
    unread = False
    for name, file in zip(names, files, strict=True):
        if Path(name).name != name:
            raise ValueError(f"read_checkpoint: {str(path)!r} names a file outside its folder, {name!r}")
        if not file.is_file():
            raise FileNotFoundError(f"read_checkpoint: no file {str(file)!r}, which {path.name} names")
        shard, partly = _content(file, allow_pickle, given)
        if not isinstance(shard, Mapping):
            raise ValueError(f"read_checkpoint: {str(file)!r} must map names to tensors, got {type(shard).__name__}")
        state, unread = {**state, **shard}, unread or partly
    return state, unread


def _weights(path: Path, content: Any, key: str | None) -> tuple[Any, str]:
    """The state dict inside a checkpoint, and the prefix that is left of the key."""
    prefix = key or ""
    while prefix and isinstance(content, Mapping):
        name, _, rest = prefix.partition(".")
        if not isinstance(content.get(name), Mapping):
            break
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
                f"read_checkpoint: {str(path)!r} holds {none}several sets of weights, {', '.join(map(repr, sets))}: "
                f"choose one with load_checkpoint(model, path, key={sets[0]!r}, ...)"
            )
        if wrapper is None and not sets:
            break
        content = content[sets[0] if wrapper is None else wrapper]
    return content, prefix


def _holds_weights(content: Any, depth: int = len(WRAPPERS)) -> bool:
    """Whether a mapping has weights in it; numbers, as of an average's decay, are none."""
    if not isinstance(content, Mapping) or not depth:
        return False
    values = content.values()
    return any(isinstance(v, Tensor) and v.dim() or _holds_weights(v, depth - 1) for v in values)


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(_is_entry(k, v) for k, v in value.items())


def _is_entry(name: Any, value: Any, unread: bool = False) -> bool:
    # a module's extra state may be anything, but nothing of which a part was passed over
    extra = isinstance(name, str) and name.endswith(_EXTRA_STATE_KEY_SUFFIX) and not unread
    return isinstance(name, str) and (isinstance(value, Tensor) or extra)


def read_config(path: str | os.PathLike) -> ViTConfig | None:
    """The config that `save_checkpoint` wrote beside the weights, None where the file has none.

    `vitfast.ViT.from_config(read_config(path))` is the model that fits.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: what is written there is no config that this release understands.
    """
    path = file_of(path)
    if not is_safetensors(path):
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            text = (file.metadata() or {}).get(CONFIG_KEY)
    except SafetensorError as error:
        raise ValueError(f"read_config: {str(path)!r} is not a whole safetensors file: {error}") from error
    if text is None:
        return None
    try:
        return ViTConfig(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise ValueError(f"read_config: the config in {str(path)!r} is not one of this release: {error}") from error
