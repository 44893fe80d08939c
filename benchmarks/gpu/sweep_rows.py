"""What `sweep.py` times: for each call that a ViT makes, the configurations of our kernel and what people use instead.

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

import vitfast
from vitfast.bench.tune import BUILT_IN, words
from vitfast.check.calls import Call, Prepared, contiguous
from vitfast.check.families import FAMILIES, Family
from vitfast.check.families.family import arguments
from vitfast.check.warmup import kernel_calls
from vitfast.choose import builtin, dispatch
from vitfast.choose.config_tables import Config, Product
from vitfast.choose.dispatch import Config as Choice
from vitfast.kernels.triton.launch import multiprocessors
from vitfast.timm_names.variants import config_for

STOCK, OURS, OTHER = "stock", "ours", "other"
# what a row belongs to
SETS = {
    "attention": "attention, forward and backward, beside every backend of SDPA",
    "prepared": "the other ops of prepared models",
    "layers": "the other ops of models as they are, inference and training",
    "models": "whole models, to see what the parts come to",
}
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
        role: `STOCK`, `OURS`, or `OTHER` for what is no choice: whole models, and comparisons, whose names are in
            parentheses.
        make: from the row's arguments what is timed; what this does itself is not.
        family: whose rule the results are held to; None for what is not judged.
        config: ours: None for the kernel's own choice; stock: {"backend": ...} of SDPA, else None.
    """

    role: str
    make: Callable[[Any], Callable[[], Any]]
    family: Family | None = None
    config: Choice | None = None


@dataclass(frozen=True)
class Row:
    """Ways to compute the same, by name, stock operators first.

    Attributes:
        group: a name of `SETS`.
        call: of an op of this package; None for whole models.
        draw: makes on a device what the variants share; of a call, its arguments.
        grad: with gradients enabled.
    """

    name: str
    group: str
    call: Call | None
    draw: Callable[[torch.Generator], Any]
    variants: Mapping[str, Variant]
    grad: bool = False


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


# rows that are calls


def row_of(call: Call, form: str, device: torch.device) -> Row:
    """A call of an op: stock operators, every configuration of its kernel, and comparisons."""
    family = FAMILIES[call.op]
    found = {"stock": Variant(STOCK, lambda args: partial(family.stock, args), family)}
    if call.op in ("attention_qkv", "attention_qkv_backward"):
        found |= _sdpa(family)
    for config in [*family.configs(call, device), *(each.as_dict() for each in _more(call, device))]:
        made = Variant(OURS, partial(_ours, family, config), family, config)
        found.setdefault(words(config) or BUILT_IN, made)
    group = "attention" if is_attention(call) else "prepared" if call.op in COMPARISONS else "layers"
    if call.op in COMPARISONS:
        name, compared = COMPARISONS[call.op]
        found[name] = Variant(OTHER, compared)
    return Row(f"{form} {call}", group, call, partial(family.draw, call), found)


def _ours(family: Family, config: Choice | None, args: Sequence[Any]) -> Callable[[], Any]:
    return partial(family.with_config, args, config)


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


def _sdpa_backward(backend: SDPBackend, args: Sequence[Any]) -> Callable[[], Any]:
    grad, qkv, _, _, scale = args
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        out = _attend(leaf, scale, backend)
    return partial(torch.autograd.grad, out, leaf, grad, retain_graph=True)


def _product_alone(args: Sequence[Any]) -> Callable[[], Tensor]:
    x, weight, _, _, bias, *_ = args
    return partial(F.linear, x, weight, bias)


def _addmm(args: Sequence[Any]) -> Callable[[], Tensor]:
    x, weight, bias, residual = args
    both = (residual + bias).flatten(0, -2)
    return lambda: torch.addmm(both, x.flatten(0, -2), weight.t()).view(residual.shape)


# of the ops that prepared models alone call
COMPARISONS: dict[str, tuple[str, Callable[[Sequence[Any]], Callable[[], Any]]]] = {
    "folded_linear": ("(cuBLAS alone)", _product_alone),
    "added_linear": ("(addmm of residual and bias)", _addmm),
}


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


def _without_saving(call: Call) -> Call:
    """The same for a linear layer whether or not it saves for its backward: that is no part of its choice."""
    return call._replace(args=(*call.args[:-1], False)) if call.op == "linear" else call


def pixels_as_bytes(call: Call) -> Call:
    """The same patch embedding of images in uint8, normalised on the way."""
    images = call.args[0]
    vector = contiguous(images.shape[1], dtype=torch.float32)
    changed = {"images": images._replace(dtype=torch.uint8), "mean": vector, "std": vector}
    return call._replace(args=tuple(changed.get(n, a) for n, a in zip(arguments(call.op), call.args, strict=True)))


# whole models


def model_row(name: str, B: int, training: bool = False, **changed: Any) -> Row:
    """A whole model in bf16, without what takes a compiler minutes."""

    def draw(generator: torch.Generator) -> dict[str, Any]:
        import timm

        device, dtype = generator.device, torch.bfloat16
        ours, theirs = vitfast.create_model(name, **changed), timm.create_model(name, **changed)
        theirs.load_state_dict(ours.state_dict())
        models = {key: m.train(training).to(device, dtype) for key, m in (("ours", ours), ("timm", theirs))}
        shape = B, ours.config.channels, *ours.config.image_size
        images = torch.randn(shape, device=device, generator=generator).to(dtype)
        classes = ours.config.num_classes
        return models | {"images": images, "labels": torch.arange(B, device=device) % classes}

    def step(which: str, given: Mapping[str, Any]) -> Callable[[], Any]:
        model, images = given[which], given["images"]
        if not training:
            return lambda: model(images)
        parameters = list(model.parameters())

        def run() -> Any:
            loss = F.cross_entropy(model(images).float(), given["labels"])
            return loss.detach(), *torch.autograd.grad(loss, parameters)[-4:]

        return run

    def on_stock(given: Mapping[str, Any]) -> Callable[[], Any]:
        call = step("ours", given)

        def run() -> Any:
            with dispatch.backend("stock"):
                return call()

        return run

    def prepared(given: Mapping[str, Any]) -> Callable[[], Any]:
        return partial(vitfast.prepare(given["ours"]), given["images"])

    ways = {"timm": partial(step, "timm"), "ours": partial(step, "ours"), "ours, stock operators": on_stock}
    if not training:
        ways["ours, prepared"] = prepared
    variants = {way: Variant(OTHER, make) for way, make in ways.items()}
    return Row(f"{TRAINING if training else INFERENCE} {name} B{B}", "models", None, draw, variants, grad=training)


# in order of value


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


def rows(device: torch.device, sets: Iterable[str] = tuple(SETS), tiny: bool = False) -> list[Row]:
    """The rows of these sets, most valuable first, none of them twice.

    Args:
        device: whose configurations are meant.
        tiny: a few of small sizes, to see that everything works.
    """
    pairs = _tiny(device) if tiny else _in_order(device)
    found: dict[Call, Row] = {}
    for form, call in pairs:
        chosen_by = _without_saving(call)
        if chosen_by not in found:
            found[chosen_by] = row_of(call, form, device)
    if tiny:
        models = [model_row(TINY, 2, img_size=32)]
    else:
        sizes = ((BASE, 256), (BASE, 64), (BASE, 1), (SMALL, 256))
        models = [*(model_row(name, B) for name, B in sizes), model_row(BASE, 128, training=True)]
    chosen = set(sets)
    return [row for row in (*found.values(), *models) if row.group in chosen]


def _tiny(device: torch.device) -> Iterator[tuple[str, Call]]:
    for form, ops in (
        (INFERENCE, ("attention_qkv", "mlp")), (PREPARED, ("folded_linear", "added_linear")),
        (TRAINING, ("attention_qkv_backward", "linear_backward")),
    ):  # fmt: skip
        found = calls(TINY, 2, form, device, img_size=32)
        yield from ((form, call) for call in found if call.op in ops and not of_one_token(call))
