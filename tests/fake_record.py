"""Records of benchmarks that nobody ran: plausible in form, their numbers drawn from a seed."""

import random

from benchmarks.core import work
from benchmarks.core.record import write_json
from vitfast.timm_names.variants import config_for

RED = "result 0: rms error 9 times the yardstick's"
SPEED = {
    "timm": 1.0, "vitfast": 1.7, "vitfast prepared": 1.8, "torchvision": 0.97, "Hugging Face": 0.9,
    "timm compiled": 1.25, "timm reduce-overhead": 1.3, "timm max-autotune": 1.4, "timm channels_last": 1.3,
    "vit-pytorch": 1.0,
    "SDPA packed": 1.0, "SDPA flash": 1.3, "SDPA cuDNN": 1.6, "SDPA efficient": 0.8, "SDPA math": 0.2,
    "F.linear": 1.0, "product": 1.5, "F.layer_norm": 1.0, "compiled": 1.15, "eager": 1.0,
    "unpatched": 1.0, "patched": 1.2,
}  # fmt: skip
VITS = (
    ("vit_tiny_patch16_224", {}), ("vit_small_patch16_224", {}), ("vit_base_patch16_224", {}),
    ("vit_large_patch16_224", {}), ("vit_base_patch16_224", {"img_size": 384}),
)  # fmt: skip


def run(device="NVIDIA H200", gpu=True, date="2026-11-20T10:00:00Z", commit="abc1234", dirty=False):
    more = {"driver": "580.1", "cuda": "13.0", "triton": "3.6.0"} if gpu else {}
    return {
        "command": "python benchmarks/run.py models", "date": date, "commit": commit, "dirty": dirty, "device": device,
        "device_type": "cuda" if gpu else "cpu", "threads": 2, "torch": "2.11.0", "timm": "1.0.31", **more,
    }  # fmt: skip


def variant(rng, name, ms, baseline, done, **more):
    ratio = SPEED[name] * rng.uniform(0.97, 1.03)
    ms = ms / ratio
    found = {
        "ours": name.startswith(("vitfast", "patched")), "compile_s": 1.0, "accepted": True, "error_ratio": 0.9,
        "ms": ms, "ms_20": ms * 0.99, "ms_80": ms * 1.02, "graph": True, "host_bound": False, "wall_ms": None,
        "tflops": done.flops / ms / 1e9, "gbps": done.bytes / ms / 1e6,
        "percent": 1e5 * max(done.flops / 790e12, done.bytes / 4.3e12) / ms,
        "limit": "compute" if done.flops / 790e12 > done.bytes / 4.3e12 else "memory",
    }  # fmt: skip
    if name != baseline:
        found |= {"ratio": ratio, "ratio_25": ratio - 0.01, "ratio_75": ratio + 0.01}
        found["within_noise"] = abs(ratio - 1) < 0.02
    return found | more


def row(rng, kind, name, mode, shape, batch, done, names, ms, dtype="bf16", **more):
    baseline = names[0]
    return {
        "key": f"{kind}/{name}/{mode}/{shape}/batch {batch}/{dtype}", "kind": kind, "name": name, "mode": mode,
        "shape": shape, "batch": batch, "dtype": dtype, "autocast": False, "notes": {}, "tf32": None,
        "work": {"flops": done.flops, "bytes": done.bytes}, "baseline": baseline, "yardstick": baseline, "noise": 1.0,
        "noise_25": 0.995, "noise_75": 1.005, "rounds": 12, "noisy": 0, "sets": 4, "others": None, "stage": "fake",
        "date": "2026-11-20T10:05:00Z", "commit": "abc1234",
        "variants": {n: variant(rng, n, ms, baseline, done) for n in names},
    } | more  # fmt: skip


def models(rng, batches=(1, 8, 64, 256), slower=1.0):
    for name, options in VITS:
        config = config_for(name, **options)
        shape = {"size": config.image_size[0], "tokens": config.num_patches + 1, "dim": config.dim}
        for batch in batches:
            ms = slower * (0.3 + 1e3 * batch * work.model(config, 1, "bf16").flops / 380e12)
            for group, names in {
                "": ("timm", "vitfast", "vitfast prepared", "torchvision", "Hugging Face"),
                " compiled": ("timm", "vitfast", "timm compiled", "timm reduce-overhead"),
                " autotuned": ("timm", "vitfast", "timm max-autotune"),
            }.items():
                done = work.model(config, batch, "bf16")
                yield row(rng, "model", name + group, "inference", shape, batch, done, names, ms, notes={"model": name})
        done = work.model(config, 64, "bf16", training=True)
        names = ("timm", "vitfast", "torchvision", "timm compiled")
        found = row(rng, "model", name, "training", shape, 64, done, names, 190 * ms, notes={"model": name})
        for n, v in found["variants"].items():
            v["peak_allocated_mib"] = done.bytes / 2**20 / SPEED[n]
            v["peak_reserved_mib"] = 1.2 * v["peak_allocated_mib"]
        yield found
    for name, gflop, speed in (("resnet50", 8.2, 250), ("mobilenetv3_large_100", 0.44, 60)):
        for batch in batches:
            done = work.Work(int(gflop * 1e9 * batch), 10**8)
            ms = slower * (0.4 + gflop * batch / speed)
            names = ("timm", "timm channels_last", "timm compiled")
            yield row(rng, "model", name, "inference", {"size": 224}, batch, done, names, ms, notes={"model": name})


def vit_pytorch(rng):
    done, names, notes = work.Work(35 * 10**9 * 64, 10**8), ("vit-pytorch", "vitfast"), {"model": "vit-pytorch"}
    shape = {"size": 224, "tokens": 197, "dim": 768}
    yield row(rng, "model", "vit-pytorch", "inference", shape, 64, done, names, 6.0, notes=notes)


def ops(rng, batch=64):
    for tokens in (197, 257):
        for mode in ("forward", "forward+backward"):
            back = mode != "forward"
            for head_dim, heads in ((64, 12), (80, 16)):
                done = work.attention(batch, tokens, heads, head_dim, "bf16", backward=back)
                names = ("SDPA packed", "vitfast", "SDPA flash", "SDPA cuDNN", "SDPA efficient", "SDPA math")
                shape = {"tokens": tokens, "heads": heads, "head_dim": head_dim}
                yield row(rng, "op", "attention", mode, shape, batch, done, names, done.bytes / 1.5e9)
            for width in (384, 768):
                rows, shape = batch * tokens, {"tokens": tokens, "width": width}
                for name, names, done in (
                    ("layer_norm", ("F.layer_norm", "vitfast", "compiled"), work.layer_norm(rows, width, "bf16")),
                    ("linear qkv", ("F.linear", "vitfast", "compiled"), work.linear(rows, width, 3 * width, "bf16")),
                    ("mlp", ("eager", "vitfast", "compiled"), work.mlp(rows, width, 4 * width, "bf16")),
                ):
                    ms = 2.2e3 * max(done.flops / 790e12, done.bytes / 4.3e12)
                    yield row(rng, "op", name, mode, shape, batch, done, names, ms)


def patched(rng, slower=1.0):
    for family in ("timm", "torchvision"):
        for mode in ("inference", "training"):
            done = work.model(config_for("vit_small_patch16_224"), 1, "bf16", training=mode == "training")
            fused = {"attention": 12, "norm": 24, "mlp": 12} if family == "timm" else {}
            notes = {"family": family, "model": "ViT-S/16", "split": "whole", "fused": fused, "left": {}}
            shape, names = {"size": 224, "tokens": 197, "dim": 384}, ("unpatched", "patched")
            yield row(rng, "patched model", family, mode, shape, 1, done, names, 0.4 * slower, notes=notes)


def ceilings():
    matmul = {"bf16": 790.0, "fp16": 801.0, "tf32": 410.0, "fp32": 51.0, "fp8": 1501.0}
    return {
        "copy": {"gbps": 4300.0, "bytes": 2**30, "seconds": 0.5},
        "matmul": {n: {"tflops": t, "first": 1.02 * t, "shape": [8192] * 3, "seconds": 2.0} for n, t in matmul.items()},
        "gemm": [
            {"name": name, "width": width, "m": 12608, "n": width, "k": width, "dtype": "bf16", "tflops": 0.5 * width}
            for width in (192, 768) for name in ("qkv", "proj")
        ],
        "before": None,
    }  # fmt: skip


def write(path, rows, run=None, ceilings=None, **more):
    data = {"schema": 1, "run": run or globals()["run"](), "earlier": [], "ceilings": ceilings or {}}
    write_json(path, data | {"rows": list(rows), "skipped": []} | more)
    return path


def parts():
    """What bench_cpu.py writes, one row a table."""

    def variants(*names):
        found = {"ratio": 2.0, "peak_mib": 7.0, "error": 1e-3}
        return {name: found | {"ms": ms} for name, ms in zip(names, (16.0, 8.0, 4.0), strict=False)}

    common = {"batch": 8, "dtype": "bf16", "noise": 1.01, "model": "vit_small_patch16_224"}
    return {
        "run": run("Some CPU (AVX-512)", False),
        "patch": [
            common
            | {"variants": variants("step by step", "vitfast", "prepared"), "baseline": "step by step"}
            | {"against": "step by step"}
            | {"ratio": [1.9, 2.1, 2.2], "ratio of prepared": [3.9, 4.1, 4.3]}
        ],
        "growth": [
            common | {"variants": variants("timm", "prepared"), "baseline": "timm", "tokens": 4097, "gflop": 9.2}
        ],
        "gelu": [
            common
            | {"variants": variants("torch", "vitfast"), "baseline": "torch", "job": "MLP", "shape": [8, 729, 3072]}
        ],
    }


def everything(folder, seed=0):
    """A GPU's and a CPU's files with all that a report shows, the odd cases too."""
    rng = random.Random(seed)
    rows = [*models(rng), *vit_pytorch(rng), *ops(rng), *patched(rng)]
    for found in rows:
        variants = found["variants"]
        if found["name"] == "attention":
            variants["flash-attn 2"] = {"ours": False, "absent": "flash_attn is not installed"}
            if found["mode"] != "forward":
                variants["SDPA math"] = {"ours": False, "not_timed": "out of memory: CUDA | tried 40 GiB"}
                variants["SDPA cuDNN"] |= {"accepted": False, "error_ratio": 3.4, "why_not_accepted": "rms"}
        if found["name"] == "vit_tiny_patch16_224" and found["batch"] == 1:
            variants["timm"]["host_bound"] = True
        if found["name"] == "mlp" and found["shape"]["width"] == 768:
            variants["vitfast"] = {"ours": True, "accepted": False, "error_ratio": 9.0, "not_timed": RED}
    write(folder / "h200_b.json", rows, ceilings=ceilings())
    cpu = run("Some CPU (AVX-512)", gpu=False)
    write(folder / "cpu.json", [*models(rng, (1, 8), slower=300), *patched(rng, 100)], cpu)
    write_json(folder / "cpu-parts.json", parts())
