"""The C++ kernels for the CPU, as functions of tensors: `vitfast._C` takes addresses, sizes and strides.

C++ cannot see how long the memory behind an address is, so every function here checks that before it hands one on, and
raises ValueError where a tensor does not fit: of weights once, where they are packed or made a part of a block.

Which instruction set they use is decided at the first call: the best that this CPU has, or the one that the environment
variable VITFAST_CPU_ISA names (portable, avx2, avx512, avx512_bf16).
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
    if not wanted:
        return next(reversed(usable.values()))
    if wanted not in usable:
        raise ValueError(f"VITFAST_CPU_ISA must be one of {list(usable)} on this machine, got {wanted!r}")
    return usable[wanted]


def takes(t: Tensor) -> bool:
    """Whether the kernels for floating point tensors run on this one here."""
    return t.dtype in FLOATS and kernels() is not None


def _fits(t: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    return t.dtype is dtype and t.shape == shape and t.is_cpu and t.is_contiguous()


def _must_fit(what: str, name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if t is not None and not _fits(t, shape, dtype):
        raise ValueError(f"{what}: {name} must be contiguous {list(shape)} in {str(dtype)[6:]}, got {_describe(t)}")


def _describe(t: Tensor) -> str:
    on = "" if t.is_cpu else f" on {t.device}"
    return f"{list(t.shape)} in {str(t.dtype)[6:]}{on}, strides {t.stride()}"


def attends(t: Tensor) -> bool:
    """Whether `attention` runs on this tensor here: not where the CPU has AMX for its dtype.

    It does not use that, and torch's own, which does, takes half its time (bf16 on a Xeon with AMX, 8 images, 2.77 and
    1.43 ms for S/16, 5.51 and 2.78 for B/16).
    """
    return takes(t) and not has_amx(t.dtype)


def has_amx(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies tiles of this dtype (AMX), as oneDNN and so torch do."""
    unit = {torch.bfloat16: "amx_bf16", torch.float16: "amx_fp16"}.get(dtype)
    return unit is not None and bool(torch.cpu.get_capabilities().get(unit))


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """softmax(scale q k^T) v as [B, Nq, H * D], and the lse [B, H, Nq] or None.

    Args:
        q: [B, Nq, H, D], k and v [B, Nk, H, D], all of one dtype of FLOATS, not empty, D side by side.
        using: kernels of another instruction set than this CPU's best.

    Raises:
        ValueError: a tensor does not fit.
    """
    if not _are_heads(q, 4) or not _are_heads(k, 4) or not _are_heads(v, 4) or q.dtype is not k.dtype:
        raise ValueError(
            "attention: q must be [B, Nq, H, D], k and v [B, Nk, H, D] in one dtype of float32, bfloat16 and float16, "
            f"with numbers in them and D side by side, got {'; '.join(map(_describe, (q, k, v)))}"
        )
    B, Nq, H, D = q.shape
    if k.shape != v.shape or k.shape[0] != B or k.shape[2:] != q.shape[2:] or k.dtype is not v.dtype:
        raise ValueError(
            f"attention: k and v must be [{B}, Nk, {H}, {D}] in {str(q.dtype)[6:]} to match q, got "
            f"{_describe(k)}; {_describe(v)}"
        )
    views = [(t.data_ptr(), *t.stride()[:3]) for t in (q, k, v)]
    return _attention(q, views, B, H, Nq, k.shape[1], D, scale, with_lse, using)


def _are_heads(t: Tensor, dims: int) -> bool:
    return t.dim() == dims and t.dtype in FLOATS and t.is_cpu and t.stride(-1) == 1 and t.numel() > 0


def attention_qkv(qkv: Tensor, scale: float, with_lse: bool, using: Any = None) -> tuple:
    """`attention` of the packed projection [B, N, 3, H, D]."""
    if not _are_heads(qkv, 5) or qkv.shape[2] != 3:
        raise ValueError(
            "attention_qkv: qkv must be [B, N, 3, H, D] in float32, bfloat16 or float16, with numbers in it and D side "
            f"by side, got {_describe(qkv)}"
        )
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
    if x.dtype not in FLOATS or not _fits(x, x.shape, x.dtype):
        raise ValueError(f"activation: x must be contiguous in float32, bfloat16 or float16, got {_describe(x)}")
    _must_fit("activation", "out", out, x.shape, x.dtype)
    (using or kernels()).activation(
        x.data_ptr(), out.data_ptr(), x.numel(), DTYPES[x.dtype], ACTIVATIONS[name], torch.get_num_threads()
    )
    return out


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, using: Any = None) -> Tensor:
    """LayerNorm over the last dim of contiguous x, not empty; weight and bias [D] contiguous; one dtype of FLOATS."""
    if x.dtype not in FLOATS or not x.numel() or not x.dim() or not _fits(x, x.shape, x.dtype):
        which = "contiguous [..., D] in float32, bfloat16 or float16"
        raise ValueError(f"layer_norm: x must be {which}, got {_describe(x)}")
    y, D = torch.empty_like(x), x.shape[-1]
    _must_fit("layer_norm", "weight", weight, (D,), x.dtype)
    _must_fit("layer_norm", "bias", bias, (D,), x.dtype)
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
        ValueError: K is odd in bfloat16; weight or bias does not fit.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, using: Any = None):
        if weight.dim() != 2 or not weight.is_cpu or not weight.numel() or not multiplies(weight.dtype, using):
            raise ValueError(f"PackedWeight: weight must be [D, K] in a dtype it can multiply, got {_describe(weight)}")
        if bias is not None and (bias.shape != weight.shape[:1] or not bias.is_cpu):
            raise ValueError(f"PackedWeight: bias must be [{weight.shape[0]}], got {_describe(bias)}")
        (self.D, self.K), self.dtype = weight.shape, weight.dtype
        if not self.takes(self.K, weight.dtype):
            raise ValueError(f"PackedWeight: K must be even in bfloat16, got {self.K}")
        self.cells = weight.new_empty(-(-self.D // MAX_LANES), self.K * MAX_LANES)
        weight = weight.contiguous()
        self.kernels = using or kernels()
        self.kernels.pack_weight(
            weight.data_ptr(), self.cells.data_ptr(), self.D, self.K, DTYPES[weight.dtype]
        )
        self.bias = None if bias is None else F.pad(bias.float(), (0, -self.D % MAX_LANES))
        self.view = self.cells.data_ptr(), 0 if bias is None else self.bias.data_ptr(), self.K, self.D

    @staticmethod
    def takes(K: int, dtype: torch.dtype) -> bool:
        return K % 2 == 0 or dtype is not torch.bfloat16

    def check(self, what: str, x: Tensor, norm: Norm | None = None) -> None:
        """Refuse an x or a norm of it that the kernels would read, or write results for, beside its memory.

        Raises:
            ValueError: x is not a contiguous [..., K] in the weight's dtype with rows in it, or the norm not one of it.
        """
        shape = x.shape
        if not shape or shape[-1] != self.K or not x.numel() or not _fits(x, shape, self.dtype):
            raise ValueError(
                f"{what}: x must be contiguous [..., {self.K}] in {str(self.dtype)[6:]}, got {_describe(x)}"
            )
        if norm is not None:
            norm.check(what, self.K, self.dtype)

    def kernels_for(self, what: str, using: Any) -> Any:
        """The kernels that read this layout.

        Raises:
            ValueError: others are asked for, to which it would be other numbers.
        """
        if using is not None and using.name != self.kernels.name:
            raise ValueError(f"{what}: weights were packed for {self.kernels.name}, got kernels of {using.name}")
        return self.kernels

    def follows(self, what: str, *others: PackedWeight) -> None:
        """Refuse weights that do not take what this one gives; each takes the results of the one before it.

        Raises:
            ValueError: another width or dtype.
        """
        for one, other in zip((self, *others), others, strict=False):
            other.kernels_for(what, one.kernels)
            if one.D != other.K or one.dtype is not other.dtype:
                raise ValueError(
                    f"{what}: a weight must take the [..., {one.D}] in {str(one.dtype)[6:]} of the one before it, got "
                    f"one for [..., {other.K}] in {str(other.dtype)[6:]}"
                )

    def __reduce_ex__(self, protocol: Any) -> Any:
        _no_copies(self)


class Norm:
    """A LayerNorm as `linear` and `mlp` read it: weight and bias [K], contiguous, in the dtype of x, or None.

    Raises:
        ValueError: weight or bias has gaps, another rank, or is not on the CPU.
    """

    def __init__(self, weight: Tensor | None, bias: Tensor | None, eps: float):
        # what the addresses point to stays, whatever becomes of a parameter's `data`
        weight, bias = (None if t is None else t.detach() for t in (weight, bias))
        self.weight, self.bias = weight, bias
        given = [t for t in (weight, bias) if t is not None]
        self.sizes = {(t.shape, t.dtype) for t in given}
        if any(t.dim() != 1 or not _fits(t, t.shape, t.dtype) for t in given):
            got = "; ".join(map(_describe, given))
            raise ValueError(f"Norm: weight and bias must be contiguous [K] on the CPU, got {got}")
        self.view = 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(), eps

    def check(self, what: str, K: int, dtype: torch.dtype) -> None:
        """Refuse rows of another length or dtype than weight and bias have.

        Raises:
            ValueError: they do not fit.
        """
        for shape, found in self.sizes:
            if shape[0] != K or found is not dtype:
                raise ValueError(
                    f"{what}: the norm's weight and bias must be [{K}] in {str(dtype)[6:]}, got {list(shape)} in "
                    f"{str(found)[6:]}"
                )

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
    weight.check("linear", x, norm)
    out = x.new_empty(*x.shape[:-1], weight.D)
    _must_fit("linear", "residual", residual, out.shape, out.dtype)
    weight.kernels_for("linear", using).linear(
        x.data_ptr(), None if norm is None else norm.view, weight.view, 0 if residual is None else residual.data_ptr(),
        out.data_ptr(), x.numel() // weight.K, DTYPES[x.dtype], _act(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


def mlp(x: Tensor, norm: Norm, fc1: PackedWeight, fc2: PackedWeight, act: str, using: Any = None) -> Tensor:
    """x + fc2(act(fc1(norm(x)))), where only the result goes to memory; x [..., K], contiguous, not empty."""
    fc1.check("mlp", x, norm)
    fc1.follows("mlp", fc2)
    if fc2.D != fc1.K:
        raise ValueError(f"mlp: fc2 must give the [..., {fc1.K}] that fc1 takes, got one for [..., {fc2.D}]")
    out = torch.empty_like(x)
    fc1.kernels_for("mlp", using).mlp(
        x.data_ptr(), norm.view, fc1.view, fc2.view, out.data_ptr(), x.numel() // fc1.K, DTYPES[x.dtype],
        _act(act), torch.get_num_threads(),
    )  # fmt: skip
    return out


def _act(name: str) -> int:
    return NO_ACT if name == "none" else ACTIVATIONS[name]


class Block:
    """What `block` runs: LayerNorm, attention, projection, LayerNorm, MLP, all of them plain.

    Raises:
        ValueError: the parts do not fit one another.
    """

    def __init__(
        self, norm1: Norm, qkv: PackedWeight, proj: PackedWeight, norm2: Norm, fc1: PackedWeight, fc2: PackedWeight,
        act: str, num_heads: int, head_dim: int, scale: float,
    ):  # fmt: skip
        C, inner = qkv.K, num_heads * head_dim
        if (qkv.D, proj.K, qkv.dtype) != (3 * inner, inner, proj.dtype) or inner < 1:
            raise ValueError(
                f"Block: qkv must give 3 * {num_heads} * {head_dim} numbers and proj take a third of them, got {qkv.D} "
                f"in {str(qkv.dtype)[6:]} and {proj.K} in {str(proj.dtype)[6:]}"
            )
        proj.kernels_for("Block", qkv.kernels)
        proj.follows("Block", fc1, fc2)
        if not proj.D == fc2.D == C:
            raise ValueError(f"Block: proj and fc2 must give the {C} numbers that qkv takes, got {proj.D} and {fc2.D}")
        for norm in (norm1, norm2):
            norm.check("Block", C, qkv.dtype)
        self.parts = norm1, qkv, proj, norm2, fc1, fc2  # keeps what the addresses point to
        self.view = *(part.view for part in self.parts), _act(act)
        self.num_heads, self.head_dim, self.scale = num_heads, head_dim, scale

    def __reduce_ex__(self, protocol: Any) -> Any:
        _no_copies(self)


def block(x: Tensor, block: Block, using: Any = None) -> Tensor:
    """y = x + proj(attention(qkv(norm1(x)))), then y + fc2(act(fc1(norm2(y)))); x [B, N, C], contiguous, not empty."""
    block.parts[1].check("block", x)
    if x.dim() != 3:
        raise ValueError(f"block: x must be [B, N, C], got {list(x.shape)}")
    out = torch.empty_like(x)
    block.parts[1].kernels_for("block", using).block(
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
        ValueError: dtype or order is not one of these; the patch does not divide the image and pad is False; out, mean
            or std does not fit.
    """
    if images.dtype not in DTYPES or dtype not in FLOATS or order not in PATCH_ORDERS:
        raise ValueError(
            f"patch_rows: images must be one of {[str(d)[6:] for d in DTYPES]}, dtype one of "
            f"{[str(d)[6:] for d in FLOATS]} and order one of {list(PATCH_ORDERS)}, got {str(images.dtype)[6:]}, "
            f"{str(dtype)[6:]} and {order!r}"
        )
    B, C, H, W, ph, pw = _sizes("patch_rows", images, patch_size)
    if prefix < 0:
        raise ValueError(f"patch_rows: prefix must be at least 0, got {prefix}")
    if not pad and (H % ph or W % pw):
        raise ValueError(f"patch_rows: images must be a multiple of the patch {ph}x{pw} in size, got {H}x{W}")
    shape = B, prefix + -(-H // ph) * -(-W // pw), C * ph * pw
    if out is None:
        out = images.new_empty(shape, dtype=dtype)
    _must_fit("patch_rows", "out", out, shape, dtype)
    scaling = _Scaling("patch_rows", images, mean, std)
    (using or kernels()).patch_rows(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), prefix, PATCH_ORDERS[order], out.data_ptr(),
        *scaling.addresses, DTYPES[images.dtype], DTYPES[dtype],
        torch.get_num_threads(),
    )  # fmt: skip
    return out


def _sizes(what: str, images: Tensor, patch_size: tuple[int, int]) -> tuple[int, ...]:
    if images.dim() != 4 or not images.is_cpu or min(patch_size) < 1:
        raise ValueError(
            f"{what}: images must be [B, C, H, W] and the patch at least 1x1, got {_describe(images)} and {patch_size}"
        )
    return *images.shape, *patch_size


class _Scaling:
    """What uint8 pixels are multiplied by and what is added; keeps what the addresses point to."""

    def __init__(self, what: str, images: Tensor, mean: Tensor | None, std: Tensor | None):
        self.addresses = 0, 0
        if images.dtype == torch.uint8 and mean is not None and std is not None:
            for name, t in (("mean", mean), ("std", std)):
                if t.shape != images.shape[1:2] or not t.is_cpu:
                    raise ValueError(f"{what}: {name} must be [{images.shape[1]}] to match images, got {_describe(t)}")
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
    B, C, H, W, ph, pw = _sizes("embed", images, patch_size)
    P = 0 if prefix is None else len(prefix)
    tokens = P + -(-H // ph) * -(-W // pw)
    if C * ph * pw != weight.K or images.dtype not in DTYPES:
        raise ValueError(f"embed: images must have {weight.K // (ph * pw)} channels, got {C} in {images.dtype}")
    for name, t, shape in (("positions", positions, (tokens, weight.D)), ("prefix", prefix, (P, weight.D))):
        _must_fit("embed", name, t, shape, weight.dtype)
    out = images.new_empty(B, tokens, weight.D, dtype=weight.dtype)
    scaling = _Scaling("embed", images, mean, std)
    weight.kernels_for("embed", using).embed(
        images.data_ptr(), images.shape, images.stride(), (ph, pw), P, PATCH_ORDERS["chw"], *scaling.addresses,
        DTYPES[images.dtype], DTYPES[weight.dtype], torch.get_num_threads(), weight.view,
        0 if positions is None else positions.data_ptr(), 0 if prefix is None else prefix.data_ptr(), out.data_ptr(),
    )  # fmt: skip
    return out
