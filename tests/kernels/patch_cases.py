"""Images for the kernels of patch embedding, in every layout, and where these kernels run."""

import pytest
import torch
from attention_cases import INTERPRETED, draw
from native_build import kernels_on_host

from vitfast import reference
from vitfast.check.acceptance import YARDSTICK_EPS, accept, rms_ratio_of_few
from vitfast.kernels.cuda import patch_embed

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
MEAN, STD = torch.linspace(0.3, 0.6, 8), torch.linspace(0.2, 0.4, 8)


def forget():
    """What the module remembers of the functions and of devices."""
    for name in ("code_of", "device_reasons", "_multiprocessors", "configs"):
        getattr(patch_embed, name).cache_clear()


@pytest.fixture
def kernels(tmp_path_factory, monkeypatch):
    """The launcher of patch embedding, whose kernels run on the host where there is no GPU: bf16 is right there too."""
    if INTERPRETED:
        host = kernels_on_host(tmp_path_factory)
        monkeypatch.setattr(patch_embed, "functions", lambda: host)
        forget()
        yield patch_embed
        host.set_shared_limit(227 << 10)
        forget()
    else:
        yield patch_embed


def pixels(*shape, dtype, device):
    if dtype == torch.uint8:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randint(0, 256, shape, generator=generator, dtype=dtype).to(device)
    return draw(*shape, dtype=dtype, device=device)


def within(images, before, after):
    """The same numbers in the middle of larger images, with what nobody may read around them."""
    B, C, H, W = images.shape
    whole = torch.full((B, C, H + 2, W + before + after), float("nan"), device=images.device)
    whole = torch.full_like(whole, 255, dtype=torch.uint8) if images.dtype == torch.uint8 else whole.to(images.dtype)
    part = whole[:, :, 1:-1, before : before + W]
    part.copy_(images)
    return part


LAYOUTS = {
    "planar": lambda x: x,
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "offset by one": lambda x: within(x, 1, 2),
    "every second column": lambda x: torch.stack([x, x], -1).flatten(-2)[..., ::2],
    "one image for all": lambda x: x[:1].expand_as(x),
    "columns first": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "aligned slice": lambda x: within(x, 16, 16),
}


def given(B, C, H, W, patch, D, *, dtype, device, image_dtype=None, P=1, positions="all", layout="planar"):
    """Arguments of `ops.patch_embed`: images, weight, bias, positions, prefix, mean and std."""
    ph, pw = patch
    images = LAYOUTS[layout](pixels(B, C, H, W, dtype=image_dtype or dtype, device=device))
    N = -(-H // ph) * -(-W // pw)
    make = lambda *shape, scale=1.0: draw(*shape, dtype=dtype, device=device, scale=scale)  # noqa: E731
    weight, bias = make(D, C, ph, pw, scale=(C * ph * pw) ** -0.5), make(D, scale=0.5)
    pos = None if positions is None else make(N + (P if positions == "all" else 0), D, scale=0.5)
    raw = images.dtype == torch.uint8
    mean, std = (t[:C].to(device) if raw else None for t in (MEAN, STD))
    return images, weight, bias, pos, make(P, D) if P else None, mean, std


def exactly(images, weight, bias, pos, prefix, mean, std):
    """Tokens in fp64; mean and std None leave uint8 pixels as they are."""
    ph, pw = weight.shape[2:]
    x = images.double() if mean is None else reference.normalise(images, mean, std, torch.float64)
    x = torch.nn.functional.pad(x, (0, -x.shape[3] % pw, 0, -x.shape[2] % ph))
    rest = [None if t is None else t.double() for t in (weight, bias, pos, prefix)]
    return reference.patch_embed(x, *rest)


def judge(out, ref, low, *, dtype=None, grad=False, what=""):
    """`accept` with the room for luck that few numbers have; in fp32 stock is no yardstick for the last bits."""
    k = rms_ratio_of_few(low.numel(), dtype or low.dtype)
    accept(out, ref, low, dtype=dtype, grad=grad, k=k, what=what)


__all__ = ["DTYPES", "LAYOUTS", "YARDSTICK_EPS", "exactly", "given", "judge", "kernels", "pixels"]
