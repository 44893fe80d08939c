"""Small cases for the tests of the harness, and a CPU that is timed without waiting."""

import torch
import torch.nn.functional as F

from benchmarks.core.harness import run_case
from vitfast.check.case import Case, Variant, Work
from vitfast.measure import device as devices


def layer_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def plain_layer_norm(x, weight, bias):
    """Right to the last bits, and no more exact than `layer_norm`."""
    wide = x.float()
    centred = wide - wide.mean(-1, keepdim=True)
    rstd = centred.square().mean(-1, keepdim=True).add(1e-5).rsqrt()
    return (centred * (rstd * weight.float()) + bias.float()).to(x.dtype)


def variant(function, **options):
    return Variant(lambda: function, **options)


def make(variants, batch=4, dtype="fp32", name="layer_norm", width=32, **options):
    to = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]

    def inputs(generator):
        x = torch.randn(batch, 5, width, generator=generator)
        weight, bias = torch.randn(2, width, generator=generator)
        return tuple(t.to(to) for t in (x, weight, bias))

    fields = {
        "kind": "op", "name": name, "mode": "forward", "shape": {"n": 5, "width": width}, "batch": batch,
        "dtype": dtype, "device": torch.device("cpu"), "inputs": inputs, "reference": layer_norm,
        "cut": lambda tensors, n: (tensors[0][:n], *tensors[1:]), "per_image": (True,),
        "variants": {"torch": variant(layer_norm), **variants}, "baseline": "torch", "yardstick": "torch",
        "work": Work(flops=8000, bytes=4000),
    }  # fmt: skip
    return Case(**{**fields, **options})


class QuickCpu(devices.Cpu):
    """No pauses and short samples: here nobody looks at the times."""

    def sampler(self):
        sampler = super().sampler()
        sampler.pause_s, sampler.min_ms = 0.0, 0.5
        return sampler


def run(variants, **options):
    return run_case(make(variants, **options), seconds=0.01, place=QuickCpu())


def on_device(place, issue_s, device_s, **options):
    """A variant that takes a simulated device so long."""

    def call(*inputs):
        place.work(issue_s, device_s)
        return layer_norm(*inputs)

    return variant(call, **options)


def named(*names, **options):
    return [make({"vitfast": variant(plain_layer_norm, ours=True)}, name=name, **options) for name in names]
