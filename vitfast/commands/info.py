"""What runs here: versions, device, and which op has which implementation, with the reason where it has none."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import torch

from vitfast.choose import dispatch, tuning_cache
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension
from vitfast.measure.machine import cpu_name
from vitfast.ops._register import implementations
from vitfast.version import __version__

PACKAGES = ("torch", "triton", "numpy", "safetensors", "timm", "vit-pytorch", "torchvision", "transformers")


def collect() -> dict[str, Any]:
    """Everything `vitfast info` prints, as plain values."""
    device = _device()
    return {
        "vitfast": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": device,
        "extension": _extension(),
        "triton": _triton(),
        "kernels": {name: dispatch.facts(name, 0 if device["cuda"] else None) for name in dispatch.KERNELS},
        "tuning": _tuning(device),
        "ops": {
            name: {
                kind: {"runs_as": path.path, "kernel": path.kernel, "why_no_kernel": path.why_no_kernel}
                for kind, path in devices.items()
            }
            for name, devices in implementations().items()
        },
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> dict[str, Any]:
    cpu = {
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }
    if torch.version.cuda is None:
        return {**cpu, "cuda": None, "why_no_cuda": "this build of torch has no CUDA"}
    if not torch.cuda.is_available():
        return {**cpu, "cuda": None, "why_no_cuda": "no CUDA device or driver was found"}
    properties = torch.cuda.get_device_properties(0)
    return {
        **cpu,
        "cuda": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "runtime": torch.version.cuda,
            "devices": torch.cuda.device_count(),
        },
    }


def _extension() -> dict[str, Any]:
    module, why = extension.load()
    if module is None:
        return {"built": False, "why": why}
    report, cuda = extension.build_report(), extension.cuda_status()
    return {
        "built": True,
        "why": "",
        "compiler": report.get("compiler"),
        "cuda": {"archs": report.get("archs", []), "toolkit": report.get("nvcc"), **cuda},
        "cpu_features": module.cpu_features(),
        "cpu_kernels": cpu_kernels.kernels().name,
        "why_no_amx": module.why_no_tiles(),
        "openmp": bool(report.get("openmp")),
    }


def _triton() -> dict[str, Any]:
    why = dispatch.why_no_kernels()
    return {"usable": not why, "why": why}


def _tuning(device: dict[str, Any]) -> dict[str, Any]:
    """Where `vitfast tune` keeps what it measured on the first GPU, and how many shapes are there."""
    if device["cuda"] is None:
        return {"path": None, "why": device["why_no_cuda"], "shapes": 0}
    path = tuning_cache.path_of(tuning_cache.key_of(0))
    return {"path": str(path), "why": "", "shapes": sum(len(dispatch.tuned(name, 0)) for name in dispatch.KERNELS)}


def _kernel_lines(kernels: dict[str, Any], triton: dict[str, Any], tuning: dict[str, Any]) -> list[str]:
    lines = ["kernels for GPUs:" if triton["usable"] else f"kernels for GPUs: not usable here ({triton['why']})"]
    width = max(map(len, kernels))
    for name, facts in kernels.items():
        parts = [facts["state"]]
        parts += [f"built in, {arch}: {words}" for arch, words in facts["builtin"].items()]
        if facts["tuned_shapes"]:
            parts.append(f"tuned: {facts['tuned_shapes']} shapes, {len(facts['tuned_to_stock'])} of them to stock")
        lines.append(f"  {name:<{width}}  {'; '.join(parts)}")
        lines += [f"  {'':<{width}}  stock for {' '.join(map(str, shape))}" for shape in facts["tuned_to_stock"]]
    kept = f"{tuning['shapes']} shapes in {tuning['path']}" if tuning["shapes"] else "nothing (`vitfast tune` measures)"
    return [*lines, f"tuned on this GPU: {tuning['why'] or kept}"]


def _extension_lines(found: dict[str, Any]) -> list[str]:
    if not found["built"]:
        return [f"extension: not built ({found['why']})"]
    cuda = found["cuda"]
    usable = ", ".join(cuda["devices"]) if cuda["usable"] else f"not usable ({cuda['why']})"
    features = [name for name, there in found["cpu_features"].items() if there]
    return [
        f"extension: built with {found['compiler']}; this CPU has {', '.join(features) or 'none of what it looks for'}",
        f"extension, CPU kernels: {found['cpu_kernels']}"
        + ("" if found["openmp"] else " on one thread (built without OpenMP)")
        + (f"; AMX is not usable: {found['why_no_amx']}" if found["why_no_amx"] else ""),
        f"extension, CUDA part: {', '.join(cuda['archs']) or 'none'}; {usable}",
    ]


def report() -> str:
    """The same as text."""
    info = collect()
    device, cuda = info["device"], info["device"]["cuda"]
    lines = [
        f"vitfast {info['vitfast']}, python {info['python']}, {info['platform']}",
        "packages: " + ", ".join(f"{name} {version or 'absent'}" for name, version in info["packages"].items()),
        f"cpu: {device['cpu']}, {device['cpu_capability']}, {device['threads']} threads on {device['cores']} cores",
        f"cuda: none, {device['why_no_cuda']}"
        if cuda is None
        else f"cuda: {cuda['devices']} x {cuda['name']}, sm_{cuda['capability'].replace('.', '')}, "
        f"{cuda['memory_gib']} GiB, runtime {cuda['runtime']}",
        *_extension_lines(info["extension"]),
        "triton: usable" if info["triton"]["usable"] else f"triton: not usable ({info['triton']['why']})",
        "ops:",
    ]
    width = max(map(len, info["ops"]))
    for name, devices in info["ops"].items():
        for kind, path in devices.items():
            why = "" if path["kernel"] else f" ({path['why_no_kernel']})"
            # beside a kernel, where something else may run
            other = path["runs_as"].partition(" (")[2]
            runs = f"{path['kernel']} ({other}" if path["kernel"] and other else path["kernel"] or path["runs_as"]
            lines.append(f"  {name:<{width}}  {kind:<4}  {runs}{why}")
    lines += _kernel_lines(info["kernels"], info["triton"], info["tuning"])
    return "\n".join(lines)
