"""Inputs for the attention kernels, what is true of them, and the stock operator that they are judged by."""

import os

import pytest
import torch
import torch.nn.functional as F

from vitfast import reference
from vitfast.check.acceptance import RMS_RATIO, YARDSTICK_EPS, accept
from vitfast.choose.config_tables import Config
from vitfast.kernels.triton import attention

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16} | ({} if INTERPRETED else {"bf16": torch.bfloat16})
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())

# one of each kernel, with tiles that a small test fills more than once
FORWARD = {
    "short": Config("short", 64),
    "short loop": Config("short", 64, loop=True),
    "online": Config("online", 64, 64),
    "online small": Config("online", 16, 32, warps=1),
    "descriptors": Config("online", 64, 64, stages=3, descriptors=True),
}
BACKWARD = {
    "short": Config("short", 32, warps=8),
    "delta first": Config("short", 32, warps=8, delta_first=True),
    "three parts": Config("short", 16, 16, warps=8, stages=3, delta_first=True),
    "head": Config("head", 32, 64, stages=1),
    "blocks": Config("blocks", 64, 32, keys_m=32, keys_n=64, keys_warps=4),
    "descriptors": Config("blocks", 64, 32, keys_m=32, keys_n=64, keys_warps=4, descriptors=True),
}
# each kernel once, where every pair would take too long
PAIRS = [("short", "short"), ("short loop", "head"), ("online", "blocks"), ("online small", "three parts"),
         ("descriptors", "descriptors")]  # fmt: skip
every_pair = pytest.mark.parametrize("forward, backward", PAIRS)
pairs_of_kernels = {
    "forward": tuple(FORWARD), "backward": tuple(BACKWARD),
    "allowed": lambda case: (case["forward"], case["backward"]) in PAIRS,
}  # fmt: skip
# what stock operators take at once
MOST_IMAGES = 65_535
LONGEST = {"short": {"forward": 272, "backward": 256}, "head": {"backward": 1 << 30}}


def fits(direction, config, keys):
    return keys <= LONGEST.get(config.kernel, {}).get(direction, 1 << 30)


def draw(*shape, dtype=torch.float32, device="cpu", scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)


LAYOUTS = ("packed", "separate", "sliced", "expanded", "padded", "heads first", "shifted", "odd rows")


def laid_out(layout, B, Nq, Nk, H, D, dtype, device):
    """q [B, Nq, H, D], k and v [B, Nk, H, D] in one of the ways in which they come, with NaN in the memory between."""

    def within(n, *, before=0, after=0, rows=0):
        whole = torch.full((B, n + rows, H, D + before + after), float("nan"), dtype=dtype, device=device)
        part = whole[:, :n, :, before : before + D]
        part.copy_(draw(B, n, H, D, dtype=dtype, device=device, seed=10 + before + 3 * after + 5 * rows))
        return part

    q, k, v = (draw(B, n, H, D, dtype=dtype, device=device, seed=i) for i, n in enumerate((Nq, Nk, Nk)))
    if layout == "packed":
        whole = torch.full((B, max(Nq, Nk), 3, H, D), float("nan"), dtype=dtype, device=device)
        whole[:, :Nq, 0], whole[:, :Nk, 1], whole[:, :Nk, 2] = q, k, v
        return whole[:, :Nq, 0], whole[:, :Nk, 1], whole[:, :Nk, 2]
    if layout == "separate":
        return q, k, v
    if layout == "sliced":
        return within(Nq, rows=3), within(Nk, rows=1), within(Nk, rows=2)
    if layout == "expanded":
        return q, k[:1].expand(B, -1, -1, -1), v[:, :, :1].expand(-1, -1, H, -1)
    if layout == "padded":
        return within(Nq, after=8), within(Nk, before=8), within(Nk, before=16, after=8)
    if layout == "heads first":
        return tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    if layout == "shifted":
        return within(Nq, before=1, after=7), within(Nk, before=8), within(Nk, before=3, after=5)
    return within(Nq, after=3), within(Nk, after=1), within(Nk, after=5)


def exact(q, k, v, scale, grad=None):
    """Output, lse and, given the output's gradient, dq, dk and dv in fp64."""
    leaves = [t.detach().double().requires_grad_(grad is not None) for t in (q, k, v)]
    out = reference.attention(*leaves, scale)
    lse = reference.attention_lse(*leaves[:2], scale).detach()
    if grad is None:
        return out, lse
    return out.detach(), lse, *torch.autograd.grad(out, leaves, grad.double())


def stock(q, k, v, scale, grad=None):
    if len(q) > MOST_IMAGES:
        halves = zip(*(t.chunk(2) for t in (q, k, v)), strict=True)
        grads = (None, None) if grad is None else grad.chunk(2)
        found = [stock(*half, scale, g) for half, g in zip(halves, grads, strict=True)]
        return tuple(torch.cat(each) for each in zip(*found, strict=True))
    leaves = [t.detach().clone().requires_grad_(grad is not None) for t in (q, k, v)]
    out = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), scale=scale).transpose(1, 2).flatten(2)
    if grad is None:
        return (out,)
    return out.detach(), *torch.autograd.grad(out, leaves, grad)


def judge(out, ref, low, *, grad=False, what="", rows=16, keys=16):
    """`accept`; where stock itself is too far off to be a yardstick, only: no further off than stock."""
    scale, error, stocks = (t.double().square().mean().sqrt() for t in (ref, out - ref, low - ref))
    k = RMS_RATIO[out.dtype] * (1 + 8 * out.numel() ** -0.5)
    # Of few rows the errors differ by chance. Of one key stock attention is exact, and dq and dk are 0: scale times k
    # or q times the difference of two equal sums of D products. Of unit normals each sum is some sqrt(D) and off by
    # 0.21 eps sqrt(D / 2) of that (vitfast/check/acceptance.py), which makes 0.21 eps sqrt(D), or 3e-7 at D = 128; a
    # factor of 3 and errors of 4 times the typical one leave 3.5e-6.
    if keys == 1 or (out.dtype is torch.float32 and rows < 9):
        rtol = max(1e-5, torch.finfo(out.dtype).eps)
        near = max(1e-5 * ref.abs().max().item(), 3.5e-6 if keys == 1 else 1e-6)
        torch.testing.assert_close(out.double(), ref, rtol=rtol, atol=near, msg=lambda text: f"{what}: {text}")
        return
    if stocks <= YARDSTICK_EPS[out.dtype] * torch.finfo(out.dtype).eps * scale:
        accept(out, ref, low, grad=grad, k=k, what=what)
    else:
        assert out.dtype == low.dtype and error <= 2 * k * stocks, f"{what}: {error:.3e}, stock's {stocks:.3e}"


def check(dtype, D, Nq, Nk, *, forward=None, backward=None, layout="packed", B=2, H=2, device="cpu", factors=(1, 1, 1)):
    """Run one forward and, where asked, one backward, and hold both to the acceptance rule."""
    q, k, v = laid_out(layout, B, Nq, Nk, H, D, dtype, device)
    for t, factor in zip((q, k, v), factors, strict=True):
        if factor != 1:
            t.mul_(factor)
    scale = D**-0.5
    grad = draw(B, Nq, H * D, dtype=dtype, device=device, seed=7) if backward else None
    ref, low = exact(q, k, v, scale, grad), stock(q, k, v, scale, grad)
    out, lse = attention.forward(q, k, v, scale, config=forward)
    judge(out, ref[0], low[0], what="out", rows=min(Nq, Nk), keys=Nk)
    torch.testing.assert_close(lse.double(), ref[1], rtol=2e-6, atol=2e-6 if dtype is torch.float32 else 2e-3)
    if backward:
        grads = attention.backward(grad, q, k, v, out, lse, scale, config=backward)
        for name, *three in zip(("dq", "dk", "dv"), grads, ref[2:], low[1:], strict=True):
            judge(*three, grad=True, what=name, rows=min(Nq, Nk), keys=Nk)
    return out, lse
