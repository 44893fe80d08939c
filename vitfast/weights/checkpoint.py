"""Checkpoints on disk: safetensors by default, pickled files only on request."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitfast.config import ViTConfig
from vitfast.vit import ViT
from vitfast.weights.described import config_of
from vitfast.weights.pos_embed import resample_pos_embed
from vitfast.weights.state_dict import PREFIXES

CONFIG_KEY = "vitfast_config"
# averaged weights first, as timm's loader takes them
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def save_checkpoint(
    model: ViT, path: str | os.PathLike, *, layout: str = "timm", with_config: bool = True
) -> None:
    """Write the model's weights and config as safetensors. An existing file is replaced only by a complete one.

    The config is that of the model as it is now, with what was exchanged in it since it was built, so that
    `ViT.from_config(read_config(path))` with these weights computes the same. It says nothing of how a model runs:
    dtype, train mode, gradient checkpointing, distilled training.

    Args:
        model: a ViT, or one wrapped by torch.compile, DataParallel or DDP.
        layout: names of the weights, 'timm' or 'vit_pytorch'.
        with_config: False writes the weights alone, of any model; whoever reads them has to build it.

    Raises:
        ValueError: the path does not end in .safetensors, or vit-pytorch has no names for these weights.
        FileNotFoundError: its folder does not exist.
        TypeError: no ViT.
        NotImplementedError: no ViTConfig describes what was made of the model: a hook, an adapter, a module of
            another class, an eps that only one norm has; names the parts. Nothing is written.
    """
    model, path = unwrapped(model), Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"save_checkpoint: path must end in .safetensors, got {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"save_checkpoint: no folder {str(path.parent)!r}")
    if not isinstance(model, ViT):
        raise TypeError(f"save_checkpoint: model must be a vitfast.ViT, got {type(model).__name__}")
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
    state = model.state_dict(layout=layout)
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


def unwrapped(model: torch.nn.Module) -> ViT:
    """The model inside the wrappers of torch.compile, DataParallel and DDP."""
    while (inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None)) is not None:
        model = inner
    return model


def read_checkpoint(path: str | os.PathLike, *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """The tensors of a checkpoint file, on the CPU, with the prefixes of DDP and torch.compile taken off the keys.

    Of a training checkpoint that has both, the averaged weights (`state_dict_ema`, `model_ema`), as timm does.

    Args:
        path: a .safetensors file, or with `allow_pickle` a .pt, .pth or .bin file.
        allow_pickle: read pickled files too (`weights_only=True`). Even so, only open files that you trust.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickled file without `allow_pickle`, or no flat mapping of names to tensors inside.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"read_checkpoint: no file {str(path)!r}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                state: Any = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
        except SafetensorError as error:
            raise ValueError(f"read_checkpoint: {str(path)!r} is not a whole safetensors file: {error}") from error
    elif allow_pickle:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or hostile file can raise anything
            raise ValueError(f"read_checkpoint: {str(path)!r} is not a whole file of plain weights: {error}") from error
    else:
        raise ValueError(
            f"read_checkpoint: path must be a .safetensors file, got {str(path)!r}; a pickled file can be read with "
            "load_checkpoint(model, path, allow_pickle=True) if you trust where it comes from"
        )
    state = _unwrap(state)
    flat = isinstance(state, Mapping) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not flat:
        raise ValueError(f"read_checkpoint: {str(path)!r} must hold a flat mapping of names to tensors")
    return {_strip(key): value for key, value in state.items()}


def _unwrap(state: Any) -> Any:
    # bounded: a pickled mapping may contain itself
    for _ in WRAPPERS:
        inner = next((k for k in WRAPPERS if isinstance(state, Mapping) and isinstance(state.get(k), Mapping)), None)
        if inner is None:
            break
        state = state[inner]
    return state


def _strip(key: str) -> str:
    while (prefix := next((p for p in PREFIXES if key.startswith(p)), None)) is not None:
        key = key[len(prefix) :]
    return key.replace("._orig_mod.", ".")  # blocks compiled one by one


def load_checkpoint(
    model: ViT, path: str | os.PathLike, *, strict: bool = True, allow_pickle: bool = False
) -> ViT:
    """Load a file written by `save_checkpoint`, by timm or by vit-pytorch into `model`.

    Positions of another image size are resampled to the model's grid. The file's own config says from which grid; a
    file without one is taken to have square images.

    Raises:
        RuntimeError: one error that lists every missing, unexpected and wrongly shaped key; nothing is loaded then.
        FileNotFoundError, ValueError: as `read_checkpoint`.
    """
    wrapped, model = model, unwrapped(model)
    state = read_checkpoint(path, allow_pickle=allow_pickle)
    own, given = model.pos_embed, state.get("pos_embed")
    if own is not None and given is not None and given.dim() == own.dim() == 3:
        prefix = 0 if model.no_embed_class else model.num_prefix_tokens
        config = read_config(path)
        if config is not None:
            grid = config.grid_size
        elif given.shape[1] != own.shape[1]:
            grid = (math.isqrt(max(given.shape[1] - prefix, 0)),) * 2
        else:
            grid = model.patch_embed.grid_size
        if prefix + grid[0] * grid[1] == given.shape[1]:
            state["pos_embed"] = resample_pos_embed(given, model.patch_embed.grid_size, grid, prefix)
    model.load_state_dict(state, strict=strict)
    return wrapped


def read_config(path: str | os.PathLike) -> ViTConfig | None:
    """The config that `save_checkpoint` wrote beside the weights, None where the file has none.

    `vitfast.ViT.from_config(read_config(path))` is the model that fits.

    Raises:
        ValueError: what is written there is no config that this release understands.
    """
    if Path(path).suffix != ".safetensors":
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
