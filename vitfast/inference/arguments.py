"""What `vitfast.prepare` is given: which device, dtype, normalisation and threads that means."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vitfast.inference.graphs import Device, graphs_of
from vitfast.kernels import cpu as cpu_kernels
from vitfast.model.vit import ViT
from vitfast.ops import _launch

DTYPES = (torch.float32, torch.bfloat16)


def folds(device: torch.device) -> bool:
    """Whether a model there is prepared for the Triton kernels, and not for those of a CPU."""
    return device.type != "cpu" or _launch.INTERPRETED


def device_of(model: ViT) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) != 1:
        where = ", ".join(sorted(map(str, devices)))
        raise NotImplementedError(f"prepare: the model must be on one device, got {where}")
    return devices.pop()


def dtype_of(model: ViT, dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if folds(device):
        return _folded_dtype(model, dtype)
    if not torch.backends.mkldnn.is_available():
        raise NotImplementedError("prepare: this build of torch has no oneDNN (torch.backends.mkldnn)")
    cpu = torch.cpu.get_capabilities()
    if dtype is None:
        dtype = next(model.blocks.parameters(), next(model.parameters())).dtype
    elif dtype == "auto":
        fast = cpu.get("avx512_bf16") or cpu.get("amx_bf16")
        dtype = torch.bfloat16 if fast and torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"prepare: dtype must be torch.float32, torch.bfloat16, 'auto' or None, got {dtype!r}")
    if dtype not in DTYPES:
        raise NotImplementedError(f"prepare: dtype must be float32 or bfloat16 on a CPU, got {str(dtype)[6:]}")
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise NotImplementedError("prepare: oneDNN has no bfloat16 on this CPU (it wants AVX-512); take float32")
    return dtype


def _folded_dtype(model: ViT, dtype: torch.dtype | str | None) -> torch.dtype:
    if dtype is None:
        return next(model.blocks.parameters(), next(model.parameters())).dtype
    if dtype == "auto":
        return torch.bfloat16
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"prepare: dtype must be a torch.dtype, 'auto' or None, got {dtype!r}")
    if dtype not in cpu_kernels.FLOATS:
        raise NotImplementedError(f"prepare: dtype must be float32, bfloat16 or float16, got {str(dtype)[6:]}")
    return dtype


def normalisation_of(model: ViT, mean: Any, std: Any) -> tuple[Tensor, Tensor] | None:
    """mean and std, [C] each, or None where nobody gave them."""
    if mean is None and std is None:
        known = getattr(model, "pretrained_cfg", None) or {}
        mean, std = known.get("mean"), known.get("std")
        if mean is None or std is None or len(mean) != model.in_chans:
            return None
    C, found = model.in_chans, []
    for name, values in (("mean", mean), ("std", std)):
        try:
            values = torch.as_tensor(values, dtype=torch.float32, device="cpu")
        except (TypeError, ValueError, RuntimeError):
            raise TypeError(f"prepare: {name} must be {C} numbers, got {values!r}") from None
        if values.shape != (C,) or not values.isfinite().all() or (name == "std" and not (values > 0).all()):
            positive = " above 0" if name == "std" else ""
            raise ValueError(f"prepare: {name} must be {C} finite numbers{positive}, got {values.tolist()}")
        found.append(values)
    return found[0], found[1]


def set_threads(threads: int | str | None) -> None:
    if threads == "auto":
        threads = min(torch.get_num_threads(), usable_cores())
    if threads is None:
        return
    if not isinstance(threads, int) or isinstance(threads, bool):
        raise TypeError(f"prepare: threads must be an int, 'auto' or None, got {threads!r}")
    if threads < 1:
        raise ValueError(f"prepare: threads must be at least 1, got {threads}")
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may keep busy: its affinity, and the quota of its control group (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def graphs_for(device: torch.device, graphs: bool | str, views: bool) -> Device | None:
    """What captures CUDA graphs, None where nothing is to."""
    if not isinstance(graphs, bool) and graphs != "auto":
        raise TypeError(f"prepare: graphs must be True, False or 'auto', got {graphs!r}")
    found = graphs_of(device) if graphs else None
    if found is None and graphs is True:
        raise ValueError(f"prepare: graphs must be False or 'auto' for a model on {device}, got True")
    if found is None and views:
        raise ValueError("prepare: views must be False where there are no CUDA graphs, got True")
    return found
