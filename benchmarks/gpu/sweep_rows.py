"""What the sweep times: for each call that a ViT makes, the configurations of our kernel and what people use instead.

Calls come from the models themselves (`vitfast.check.calls`), their configurations, arguments and truths from
`vitfast.check.families`; a few configurations that no table has yet are added. Rows come in order of value: what comes
last may have to wait for another half hour. Of a model's last block, which computes one token of an image, only that of
the base model is here. Shapes: B images, N tokens, D channels, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitfast.check.calls import Call, Prepared, contiguous
from vitfast.check.families import FAMILIES, Family
from vitfast.check.families.family import arguments
from vitfast.check.measuring import BUILT_IN
from vitfast.check.tune import words
from vitfast.check.warmup import kernel_calls
from vitfast.choose import builtin
from vitfast.choose.config_tables import Config, Product
from vitfast.choose.dispatch import Config as Choice
from vitfast.kernels.triton.launch import multiprocessors
from vitfast.timm_names.variants import config_for

aten = torch.ops.aten
STOCK, OURS = "stock", "ours"
BASE, SMALL = "vit_base_patch16_224", "vit_small_patch16_224"
TINY, LARGE = "vit_tiny_patch16_224", "vit_large_patch16_224"
SO400M, BASE_384, BASE_518 = "vit_so400m_patch14_siglip_224", "vit_base_patch16_384", "vit_base_patch14_dinov2"
INFERENCE, TRAINING, PREPARED, AUTOCAST = "inference", "training", "prepared", "training with autocast"
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
# columns whose statistics are together, of a device whose products leave none
PIECE = 64


@dataclass(frozen=True)
class Variant:
    """One way to compute a row.

    Attributes:
        role: `STOCK` or `OURS`.
        make: from the row's arguments what is timed; what this does itself is not.
        family: whose rule the results are held to.
        config: ours: None for the kernel's own choice; stock: {"backend": ...} of SDPA, else None.
    """

    role: str
    make: Callable[[Any], Callable[[], Any]]
    family: Family
    config: Choice | None = None


@dataclass(frozen=True)
class Row:
    """Ways to compute a call of an op, by name, stock operators first."""

    name: str
    call: Call
    variants: Mapping[str, Variant]


# configurations that no table has

TILES = partial(Product, "tiles", descriptors=True)
MANY = (
    TILES(128, 128, 64, warps=4, stages=3, parts=2, persistent=True, programs=2),
    TILES(128, 128, 64, warps=4, stages=3, parts=4, persistent=True, programs=2),
    TILES(128, 128, 64, warps=4, stages=3, parts=4),
    TILES(128, 128, 64, warps=8, stages=3, parts=2),
    TILES(128, 128, 64, warps=8, stages=3, parts=4),
    TILES(128, 128, 64, warps=8, stages=3, parts=2, persistent=True, programs=2),
    TILES(128, 128, 32, warps=4, stages=5, parts=4, persistent=True, programs=2),
    TILES(128, 256, 64, warps=8, stages=3, parts=4, persistent=True),
    TILES(256, 128, 64, warps=8, stages=3, parts=4, persistent=True),
)
FEW = (
    TILES(64, 64, 128, stages=4), TILES(64, 64, 128, stages=4, split=4), TILES(64, 64, 64, stages=4),
    TILES(64, 64, 64, stages=6), TILES(64, 32, 128, stages=4), TILES(64, 128, 64, stages=4, parts=2),
    TILES(64, 128, 128, stages=3, parts=2), TILES(128, 64, 64, stages=4, parts=2),
    TILES(128, 64, 128, stages=3, parts=2),
)  # fmt: skip
FORWARD = (
    Config("short", 64), Config("short", 64, stages=1, loop=True), Config("short", 64, stages=2, loop=True),
    *(Config("online", 64, n, stages=s, registers=r) for n, s in ((32, 3), (32, 4), (64, 3)) for r in (0, 96, 128)),
    Config("online", 64, 64), Config("online", 64, 128), Config("online", 128, 64, warps=8, stages=3),
    Config("online", 128, 32, warps=8, stages=4),
)  # fmt: skip
BLOCKS = partial(Config, "blocks")
BACKWARD = (
    Config("short", 32, warps=8), Config("short", 32, warps=8, stages=1),
    # which spills 24 bytes a thread
    Config("short", 32, 16, warps=8, delta_first=True),
    *(BLOCKS(64, 32, stages=3, keys_m=m, keys_n=n, keys_warps=w) for m, n, w in ((32, 64, 4), (64, 64, 4))),
    *(BLOCKS(128, 64, warps=8, stages=s, keys_m=m, keys_n=64, keys_warps=4) for s in (1, 2, 3) for m in (32, 64)),
    BLOCKS(64, 64, keys_m=64, keys_n=64, keys_warps=4), BLOCKS(64, 64, stages=3, keys_m=32, keys_n=64, keys_warps=4),
    BLOCKS(64, 64, keys_m=16, keys_n=64, keys_warps=4), BLOCKS(128, 32, warps=8, stages=3, keys_m=32, keys_n=64,
                                                              keys_warps=4),
)  # fmt: skip


def _more(call: Call, device: torch.device) -> Iterable[Config | Product]:
    """Configurations beside those of the tables, in half precision."""
    if torch.finfo(call.dtype).bits != 16:
        return ()
    if is_attention(call):
        backward = call.op.endswith("_backward")
        # queries and keys are of one packed tensor, or keys are the second
        keys = call.args[backward + ("qkv" not in call.op)].shape[1]
        table = BACKWARD if backward else FORWARD
        name = "attention_backward" if backward else "attention"
        return [config for config in table if builtin.longest(name, config.kernel) >= keys]
    if call.op not in ("linear", "folded_linear", "added_linear", "mlp", "mlp_backward"):
        return ()
    of = dict(zip(arguments(call.op), call.args, strict=True))
    N = of["w1" if "w1" in of else "weight"].shape[0]
    tiles = -(-_rows_of(of["x"].shape) // 128) * -(-N // 128) / multiprocessors(device)
    if call.op in ("folded_linear", "added_linear"):
        return FEW if tiles <= 1 else (*MANY, *FEW) if tiles <= 4 else MANY
    return FEW[:6] if tiles <= 4 else MANY[:4]


def _rows_of(shape: Sequence[int]) -> int:
    return torch.Size(shape[:-1]).numel()


def row_of(call: Call, form: str, device: torch.device) -> Row:
    """A call of an op: stock operators, and every configuration of its kernel."""
    family = FAMILIES[call.op]
    found = {"stock": Variant(STOCK, lambda args: partial(family.stock, args), family)}
    if call.op in ("attention_qkv", "attention_qkv_backward"):
        found |= _sdpa(family)
    for config in [*family.configs(call, device), *(each.as_dict() for each in _more(call, device))]:
        made = Variant(OURS, lambda args, config=config: partial(family.with_config, args, config), family, config)
        found.setdefault(words(config) or BUILT_IN, made)
    return Row(f"{form} {call}", call, found)


def _sdpa(family: Family) -> dict[str, Variant]:
    """Every backend of torch's attention, which returns no statistics."""
    make = _sdpa_backward if family.grad else _sdpa_forward
    judged = family if family.grad else replace(family, extra=lambda results: results[:1])
    return {
        f"SDPA {name}": Variant(STOCK, partial(make, backend), judged, {"backend": name})
        for name, backend in BACKENDS.items()
    }


def _attend(qkv: Tensor, scale: float, backend: SDPBackend) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def _sdpa_forward(backend: SDPBackend, args: Sequence[Any]) -> Callable[[], Tensor]:
    return partial(_attend, *args, backend)


def _sdpa_backward(backend: SDPBackend, args: Sequence[Any]) -> Callable[[], Tensor]:
    """What autograd calls, without autograd: the host's time for it is no part of a kernel's, and graphs hold it."""
    grad, qkv, _, _, scale = args
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    run = BACKWARDS[backend](grad.unflatten(-1, qkv.shape[3:]).transpose(1, 2), q, k, v, scale)
    return lambda: torch.stack([each.transpose(1, 2) for each in run()[:3]], dim=2)


def _flash_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Sequence[Tensor]]:
    out, lse, *given, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)
    backward = aten._scaled_dot_product_flash_attention_backward
    return partial(backward, grad, q, k, v, out, lse, *given, 0.0, False, seed, offset, scale=scale)


def _cudnn_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Sequence[Tensor]]:
    found = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)
    out, lse, *given, seed, offset, _ = found
    backward = aten._scaled_dot_product_cudnn_attention_backward
    return partial(backward, grad, q, k, v, out, lse, seed, offset, None, *given, 0.0, False, scale=scale)


def _efficient_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[], Sequence[Tensor]]:
    out, *left = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    backward, wanted = aten._scaled_dot_product_efficient_attention_backward, [True, True, True, False]
    return partial(backward, grad, q, k, v, None, out, *left, 0.0, wanted, scale=scale)


BACKWARDS = {
    SDPBackend.FLASH_ATTENTION: _flash_backward, SDPBackend.CUDNN_ATTENTION: _cudnn_backward,
    SDPBackend.EFFICIENT_ATTENTION: _efficient_backward,
}  # fmt: skip


def calls(
    name: str, B: int, form: str, device: torch.device, dtype: torch.dtype = torch.bfloat16, **changed: Any
) -> list[Call]:
    """The calls of a model that a kernel may run; of a prepared one each product after a norm in both of its forms."""
    config = config_for(name, **changed)
    if form == AUTOCAST:
        return kernel_calls([config], (B,), torch.float32, True, dtype)
    if form != PREPARED:
        return kernel_calls([config], (B,), dtype, form == TRAINING)
    found = kernel_calls([Prepared(config, dtype, device)], (B,), dtype, False)
    return list(dict.fromkeys(each for call in found for each in _with_and_without_pieces(call)))


def _with_and_without_pieces(call: Call) -> Iterator[Call]:
    yield call
    if call.op != "folded_linear":
        return
    at = arguments(call.op).index("pieces")
    x, pieces = call.args[0], call.args[at]
    statistics = contiguous(x.shape[-1] // PIECE, 2, _rows_of(x.shape), dtype=torch.float32)
    yield call._replace(args=(*call.args[:at], statistics if pieces is None else None, *call.args[at + 1 :]))


def is_attention(call: Call) -> bool:
    return call.op.startswith("attention")


def of_one_token(call: Call) -> bool:
    """Whether an image has one row: its class token."""
    first = call.likes()[0].shape
    return len(first) > 2 and first[1] == 1


def pixels_as_bytes(call: Call) -> Call:
    """The same patch embedding of images in uint8, normalised on the way."""
    images = call.args[0]
    vector = contiguous(images.shape[1], dtype=torch.float32)
    changed = {"images": images._replace(dtype=torch.uint8), "mean": vector, "std": vector}
    return call._replace(args=tuple(changed.get(n, a) for n, a in zip(arguments(call.op), call.args, strict=True)))


def _in_order(device: torch.device) -> Iterator[tuple[str, Call]]:
    """Form and call, some of them more than once."""

    def of(names: Sequence[str], batches: Sequence[int], *forms: str, **more: Any) -> Iterator[tuple[str, Call]]:
        for name in names:
            for B in batches:
                for form in forms:
                    yield from ((form, call) for call in calls(name, B, form, device, **more))

    def only(keep: Callable[[Call], bool], pairs: Iterable[tuple[str, Call]]) -> Iterator[tuple[str, Call]]:
        return (pair for pair in pairs if keep(pair[1]))

    def all_tokens(call: Call) -> bool:
        return not of_one_token(call)

    def attention(call: Call) -> bool:
        return is_attention(call) and all_tokens(call)

    first = (BASE, SMALL)
    yield from only(attention, of(first, (256, 64, 1), INFERENCE, TRAINING))
    yield from only(all_tokens, of(first, (256, 64, 1), INFERENCE, PREPARED))
    yield from only(all_tokens, of(first, (256, 64), TRAINING))
    yield from only(all_tokens, of(first, (64,), AUTOCAST))
    yield from only(all_tokens, of(first, (8,), INFERENCE, PREPARED))
    yield from only(all_tokens, of((TINY,), (256, 64), INFERENCE, PREPARED))
    yield from only(all_tokens, of((TINY,), (256,), TRAINING))
    yield from only(all_tokens, of((LARGE, SO400M), (64,), INFERENCE, PREPARED, TRAINING))
    yield from only(all_tokens, of((BASE_384, BASE_518), (32,), INFERENCE, PREPARED))
    yield from only(attention, of((BASE_384, BASE_518), (32,), TRAINING))
    for B in (256, 64, 1):
        embeds = [call for call in calls(BASE, B, INFERENCE, device) if call.op == "patch_embed"]
        yield from ((INFERENCE, pixels_as_bytes(call)) for call in embeds)
    yield from only(of_one_token, of((BASE,), (64,), INFERENCE, PREPARED))
    for dtype in (torch.float16, torch.float32):
        spot = [call for call in calls(BASE, 64, INFERENCE, device, dtype) if all_tokens(call)]
        yield from ((INFERENCE, call) for call in spot if call.op in ("attention_qkv", "mlp"))


def rows(device: torch.device, tiny: bool = False) -> list[Row]:
    """The rows, most valuable first, none of them twice.

    Args:
        device: whose configurations are meant.
        tiny: a few of small sizes, to see that everything works.
    """
    found: dict[Call, Row] = {}
    for form, call in _tiny(device) if tiny else _in_order(device):
        # whether a linear layer saves for its backward is no part of its choice
        chosen_by = call._replace(args=(*call.args[:-1], False)) if call.op == "linear" else call
        if chosen_by not in found:
            found[chosen_by] = row_of(call, form, device)
    return list(found.values())


def _tiny(device: torch.device) -> Iterator[tuple[str, Call]]:
    for form, ops in (
        (INFERENCE, ("attention_qkv", "mlp")), (PREPARED, ("folded_linear", "added_linear")),
        (TRAINING, ("attention_qkv_backward", "linear_backward")),
    ):  # fmt: skip
        found = calls(TINY, 2, form, device, img_size=32)
        yield from ((form, call) for call in found if call.op in ops and not of_one_token(call))
