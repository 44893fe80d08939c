"""The C++ kernels for the CPU, as functions of tensors: `vitfast._C` takes addresses, sizes and strides.

Which instruction set they use is decided at the first call: the best that this CPU has, or with the environment
variable VITFAST_CPU_ISA (portable, avx2, avx512, avx512_bf16) the best up to that one.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vitfast import extension

# as in csrc/cpu_kernels.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3}
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}
PATCH_ORDERS = {"chw": 0, "hwc": 1}
NO_ACT = -1
MAX_LANES = 16
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def kernels() -> Any:
    """The kernels for this CPU, None where there is no extension.

    Raises:
        ValueError: VITFAST_CPU_ISA names no instruction set that this CPU and build have.
    """
    module, _ = extension.load()
    if module is None:
        return None
    usable = {each.name: each for each in module.usable_kernels()}
    wanted = os.environ.get("VITFAST_CPU_ISA")
    if wanted is None:
        return next(reversed(usable.values()))
    if wanted not in usable:
        raise ValueError(f"VITFAST_CPU_ISA must be one of {list(usable)} on this machine, got {wanted!r}")
    return usable[wanted]


def takes(t: Tensor) -> bool:
    """Whether the kernels for floating point tensors run on this one here."""
    return t.dtype in FLOATS and kernels() is not None


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """softmax(scale q k^T) v as [B, Nq, H * D], and the lse [B, H, Nq] or None.

    Args:
        q: [B, Nq, H, D], k and v [B, Nk, H, D], all of one dtype of FLOATS, not empty, D side by side.
        using: kernels of another instruction set than this CPU's best.
    """
    B, Nq, H, D = q.shape
    views = [(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v)]
    return _attention(q, views, B, H, Nq, k.shape[1], D, scale, with_lse, using)


def attention_qkv(qkv: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """`attention` of the packed projection [B, N, 3, H, D]."""
    B, N, _, H, D = qkv.shape
    image, token, part, head, _ = qkv.stride()
    start, step = qkv.data_ptr(), part * qkv.element_size()
    views = [(start + i * step, image, token, head) for i in range(3)]
    return _attention(qkv, views, B, H, N, N, D, scale, with_lse, using)


def _attention(like, views, B, H, Nq, Nk, D, scale, with_lse, using):
    out = like.new_empty(B, Nq, H * D)
    lse = like.new_empty(B, H, Nq, dtype=torch.float32) if with_lse else None
    (using or kernels()).attention(
        *views, out.data_ptr(), lse.data_ptr() if with_lse else 0, B, H, Nq, Nk, D, scale, DTYPES[like.dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out, lse


def activation(x: Tensor, name: str, out: Tensor, using: Any = None) -> Tensor:
    """The activation of contiguous x in a dtype of FLOATS, written to `out` (which may be x)."""
    (using or kernels()).activation(
        x.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype], ACTIVATIONS[name], torch.get_num_threads()
    )
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, using: Any = None) -> Tensor:
    """LayerNorm over the last dim of contiguous x, not empty; weight and bias [D] contiguous; one dtype of FLOATS."""
    y, D = torch.empty_like(x), x.shape[-1]
    (using or kernels()).layer_norm(
        x.data_ptr(), y.data_ptr(), 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        x.numel() // D, D, eps, DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def multiplies(dtype: torch.dtype, using: Any = None) -> bool:
    """Whether `linear` takes tensors of this dtype: fp32, and bf16 where the CPU multiplies that."""
    found = using or kernels()
    return found is not None and dtype in FLOATS and found.multiplies(DTYPES[dtype])


class PackedWeight:
    """A weight [D, K] and a bias [D] as `linear` and `mlp` read them.

    Args:
        weight: in a dtype for which `multiplies` is True; K even in bfloat16.
        using: kernels of another instruction set than this CPU's best; the same must multiply it.

    Raises:
        ValueError: K is odd in bfloat16.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, using: Any = None):
        (self.D, self.K), self.dtype = weight.shape, weight.dtype
        if not self.takes(self.K, weight.dtype):
            raise ValueError(f"PackedWeight: K must be even in bfloat16, got {self.K}")
        self.cells = weight.new_empty(-(-self.D // MAX_LANES), self.K * MAX_LANES)
        weight = weight.contiguous()
        (using or kernels()).pack_weight(
            weight.data_ptr(), self.cells.data_ptr(), self.D, self.K, DTYPES[weight.dtype]
        )
        self.bias = None if bias is None else F.pad(bias.float(), (0, -self.D % MAX_LANES))
        self.view = self.cells.data_ptr(), 0 if bias is None else self.bias.data_ptr(), self.K, self.D

    @staticmethod
    def takes(K: int, dtype: torch.dtype) -> bool:
        return K % 2 == 0 or dtype is not torch.bfloat16

    def check(self, what: str, x: Tensor) -> None:
        """Refuse an x that the kernels would read, or write results for, beside its memory.

        Raises:
            ValueError: x is not a contiguous [..., K] in the weight's dtype.
        """
        if x.dtype is not self.dtype or x.shape[-1] != self.K or not x.is_contiguous():
            raise ValueError(
                f"{what}: x must be contiguous [..., {self.K}] in {str(self.dtype)[6:]}, got {list(x.shape)} in "
                f"{str(x.dtype)[6:]}, strides {x.stride()}"
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        _no_copies(self)


class Norm:
    """A LayerNorm as `linear` and `mlp` read it: weight and bias [K], contiguous, in the dtype of x, or None."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float):
        self.weight, self.bias = weight, bias
        self.view = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(), eps

    def __reduce_ex__(self, protocol: Any) -> Any:
        _no_copies(self)


def _no_copies(what: Any) -> None:
    raise NotImplementedError(f"{type(what).__name__} holds addresses and cannot be copied or pickled")


def linear(
    x: Tensor,
    weight: PackedWeight,
    *,
    norm: Norm | None = None,
    act: str = "none",
    residual: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """residual + act(norm(x) @ weight.T + bias), rounded once; the normed x is rounded too.

    Args:
        x: [..., K], contiguous, not empty, in the dtype of the weight.
        act: 'none' or one of ACTIVATIONS.
        residual: [..., D], contiguous.
    """
    weight.check("linear", x)
    out = x.new_empty(*x.shape[:-1], weight.D)
    if residual is not None and (
        residual.shape != out.shape or residual.dtype is not out.dtype or not residual.is_contiguous()
    ):
        raise ValueError(
            f"linear: residual must be contiguous {list(out.shape)} in {str(out.dtype)[6:]}, got "
            f"{list(residual.shape)} in {str(residual.dtype)[6:]}, strides {residual.stride()}"
        )
    (using or kernels()).linear(
        x.data_ptr(), None if norm is None else norm.view, weight.view, 0 if residual is None else residual.data_ptr(),
        out.data_ptr(), x.numel() // weight.K, DTYPES[x.dtype], _act(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mlp(x: Tensor, norm: Norm, fc1: PackedWeight, fc2: PackedWeight, act: str, using: Any = None) -> Tensor:
    """x + fc2(act(fc1(norm(x)))), where only the result goes to memory; x [..., K], contiguous, not empty."""
    fc1.check("mlp", x)
    out = torch.empty_like(x)
    (using or kernels()).mlp(
        x.data_ptr(), norm.view, fc1.view, fc2.view, out.data_ptr(), x.numel() // fc1.K, DTYPES[x.dtype],
        _act(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _act(name: str) -> int:
    return NO_ACT if name == "none" else ACTIVATIONS[name]


class Block:
    """What `block` runs: LayerNorm, attention, projection, LayerNorm, MLP, all of them plain."""

    def __init__(
        self, norm1: Norm, qkv: PackedWeight, proj: PackedWeight, norm2: Norm, fc1: PackedWeight, fc2: PackedWeight,
        act: str, num_heads: int, head_dim: int, scale: float,
    ):  # fmt: skip
        self.parts = norm1, qkv, proj, norm2, fc1, fc2  # keeps what the addresses point to
        self.view = *(part.view for part in self.parts), _act(act)
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale

    def __reduce_ex__(self, protocol: Any) -> Any:
        _no_copies(self)


def block(x: Tensor, block: Block, using: Any = None) -> Tensor:
    """y = x + proj(attention(qkv(norm1(x)))), then y + fc2(act(fc1(norm2(y)))); x [B, N, C], contiguous, not empty."""
    block.parts[1].check("block", x)
    out = torch.empty_like(x)
    (using or kernels()).block(
        x.data_ptr(), block.view, out.data_ptr(), *x.shape[:2], block.num_heads, block.head_dim, block.scale,
        DTYPES[x.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return out


def patch_rows(
    images: Tensor,
    patch_size: tuple[int, int],
    *,
    order: str = "chw",
    dtype: torch.dtype = torch.float32,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    prefix: int = 0,
    pad: bool = False,
    out: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """Images -> rows of pixels for the patch projection, `reference.patch_rows` in one pass.

    Args:
        images: [B, C, H, W] of any strides, in a dtype of DTYPES.
        patch_size: ph, pw.
        order: of the pixels in a row, 'chw' as conv weights [D, C, ph, pw] flatten, or 'hwc'.
        dtype: of the rows, one of FLOATS.
        mean, std: [C], for uint8 images, which become (images / 255 - mean) / std; without, they become 0 to 255.
        prefix: rows of zeros in front of each image's patches.
        pad: zeros, after the normalisation, at right and bottom where the patch does not divide the image.
        out: where to write the rows, contiguous.
        using: kernels of another instruction set than this CPU's best.

    Returns:
        [B, prefix + N, C * ph * pw], N = ceil(H / ph) * ceil(W / pw), row-major.

    Raises:
        ValueError: dtype or order is not one of these; the patch does not divide the image and pad is False; out does
            not fit.
    """
    if images.dtype not in DTYPES or dtype not in FLOATS or order not in PATCH_ORDERS:
        raise ValueError(
            f"patch_rows: images must be one of {[str(d)[6:] for d in DTYPES]}, dtype one of "
            f"{[str(d)[6:] for d in FLOATS]} and order one of {list(PATCH_ORDERS)}, got {str(images.dtype)[6:]}, "
            f"{str(dtype)[6:]} and {order!r}"
        )
    (B, C, H, W), (ph, pw) = images.shape, patch_size
    if not pad and (H % ph or W % pw):
        raise ValueError(f"patch_rows: images must be a multiple of the patch {ph}x{pw} in size, got {H}x{W}")
    shape = B, prefix + -(-H // ph) * -(-W // pw), C * ph * pw
    if out is None:
        out = images.new_empty(shape, dtype=dtype)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ValueError(
            f"patch_rows: out must be contiguous {list(shape)} in {str(dtype)[6:]}, got {list(out.shape)} in "
            f"{str(out.dtype)[6:]}, strides {out.stride()}"
        )
    scaling = _Scaling(images, mean, std)
    (using or kernels()).patch_rows(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), prefix, PATCH_ORDERS[order], out.data_ptr(),
        *scaling.addresses, DTYPES[images.dtype], DTYPES[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


class _Scaling:
    """What uint8 pixels are multiplied by and what is added; keeps what the addresses point to."""

    def __init__(self, images: Tensor, mean: Tensor | None, std: Tensor | None):
        self.addresses = 0, 0
        if images.dtype == torch.uint8 and mean is not None and std is not None:
            scale = 1 / std.double()
            self.shift = -(mean.double() * scale).float()
            self.scale = (scale / 255).float()
            self.addresses = self.scale.data_ptr(), self.shift.data_ptr()


def embed(
    images: Tensor,
    patch_size: tuple[int, int],
    weight: PackedWeight,
    positions: Tensor | None,
    prefix: Tensor | None,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    using: Any = None,
) -> Tensor:
    """Images -> tokens [B, P + N, D] in the weight's dtype: prefix, and rows of pixels @ weight.T + bias + positions.

    Args:
        images, patch_size, mean, std: as in `patch_rows`, in the order chw; the patch may not divide the image, then
            there are zeros at right and bottom.
        weight: of the projection, K = C * ph * pw.
        positions: [P + N, D], contiguous, in the weight's dtype; those of prefix tokens are not looked at.
        prefix: [P, D], contiguous, in the weight's dtype, with their positions.

    Raises:
        ValueError: a tensor does not fit.
    """
    (B, C, H, W), (ph, pw) = images.shape, patch_size
    P = 0 if prefix is None else len(prefix)
    tokens = P + -(-H // ph) * -(-W // pw)
    if C * ph * pw != weight.K or images.dtype not in DTYPES:
        raise ValueError(f"embed: images must have {weight.K // (ph * pw)} channels, got {C} in {images.dtype}")
    for name, t, shape in (("positions", positions, (tokens, weight.D)), ("prefix", prefix, (P, weight.D))):
        if t is not None and (t.shape != shape or t.dtype is not weight.dtype or not t.is_contiguous()):
            raise ValueError(f"embed: {name} must be contiguous {list(shape)} in {weight.dtype}, got {list(t.shape)}")
    out = images.new_empty(B, tokens, weight.D, dtype=weight.dtype)
    scaling = _Scaling(images, mean, std)
    (using or kernels()).embed(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), P, PATCH_ORDERS["chw"], *scaling.addresses,
        DTYPES[images.dtype], DTYPES[weight.dtype], torch.get_num_threads(), weight.view,
        0 if positions is None else positions.data_ptr(), 0 if prefix is None else prefix.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out
