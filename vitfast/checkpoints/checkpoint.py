"""Checkpoints on disk: safetensors by default, pickled files only on request."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from vitfast.checkpoints.described import config_of
from vitfast.checkpoints.files import file_of, is_safetensors
from vitfast.checkpoints.reading import read
from vitfast.config import ViTConfig
from vitfast.model.vit import ViT
from vitfast.weights.names import own_weights

CONFIG_KEY = "vitfast_config"


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
        path: a .safetensors file, an .npz file of numpy's arrays, or with `allow_pickle` a .pt, .pth, .pth.tar, .ckpt
            or .bin file; the .index.json of shards; a folder of transformers, accelerate or timm, whose
            model.safetensors is read where there is a pytorch_model.bin too.
        allow_pickle: read pickled files too (nothing that they name is run, and what is no tensor is passed over). Even
            so, only open files that you trust.
        key: of a file with several models the one to take, by its name in the file or before its keys: 'teacher',
            'teacher.backbone'.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a pickled file without `allow_pickle`, no flat mapping of names to tensors inside, or several of
            them and no `key`; names what there is.
    """
    return read(path, allow_pickle=allow_pickle, key=key, mapped=False).state


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
