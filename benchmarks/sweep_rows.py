"""What `sweep.py` times: for each call that a ViT makes, the configurations of our kernel and what people use instead.

Shapes: B images, N tokens, D channels, H heads. Everything is in bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import vitfast
from vitfast import dispatch, ops
from vitfast.families import FAMILIES, present
from vitfast.kernels import tuning
from vitfast.kernels.tuning import Config, Product
from vitfast.tuning import words
from vitfast.variants import config_for
from vitfast.warm_up import kernel_calls

DEVICE, DTYPE = torch.device("cuda"), torch.bfloat16
# of a H100 and a H200; on others a few rows may be missing, or too many
MULTIPROCESSORS, ARCH = 132, 90
NAMES = {192: "vit_tiny_patch16_224", 384: "vit_small_patch16_224", 768: "vit_base_patch16_224",
         1024: "vit_large_patch16_224"}  # fmt: skip
BASE = NAMES[768]
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}  # fmt: skip
Variants = dict[str, Callable[[], Callable[[], Any]]]


@dataclass(frozen=True)
class Row:
    """Calls that compute the same, the first of them the measure.

    Attributes:
        inputs: makes what they share.
        variants: what makes each, by name. Its names must not depend on the inputs, which are None for them.
        grad: with gradients enabled.
    """

    name: str
    inputs: Callable[[], Any]
    variants: Callable[[Any], Variants]
    grad: bool = False

    def names(self) -> list[str]:
        return list(self.variants(None))


def differentiated(call: Any) -> bool:
    """Whether `call` is the backward of a forward that ran before."""
    return isinstance(call, partial) and call.func is torch.autograd.grad


def trying(kernel: str, config: Config | Product, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with dispatch.trying(kernel, "kernel", config.as_dict()):
            return call()

    return run


def under(backend: str, call: Callable[[], Any]) -> Callable[[], Any]:
    def run() -> Any:
        with dispatch.backend(backend):
            return call()

    return run


# products

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


def products(M: int, N: int, K: int) -> list[Product]:
    tiles = -(-M // 128) * -(-N // 128) / MULTIPROCESSORS
    more = FEW if tiles <= 1 else (*MANY, *FEW) if tiles <= 4 else MANY
    table = tuning.product_candidates(ARCH, 16, M, N, K, MULTIPROCESSORS, True)
    return list(dict.fromkeys([*table, *more]))


def block_of(D: int, B: int, N: int) -> dict[str, Any]:
    """A block, the same folded, and inputs of its products."""
    from vitfast.folded import FoldedBlock

    torch.manual_seed(0)
    model = vitfast.ViT.from_config(config_for(NAMES[D]).replace(depth=1)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    block = model.blocks[0].to(DEVICE)
    folded = FoldedBlock(block, DTYPE).to(DEVICE)
    x, residual, hidden = (torch.randn(B, N, n, device=DEVICE).to(DTYPE) for n in (D, D, 4 * D))
    parts = x.float().view(-1, D // 64, 64)
    mean = parts.mean(-1)
    pieces = torch.stack((mean, (parts - mean[..., None]).square().sum(-1)), 1).permute(2, 1, 0).contiguous()
    made = {"block": block.to(DTYPE), "folded": folded, "x": x, "residual": residual}
    return made | {"hidden": hidden, "pieces": pieces}


def normed(x: Tensor, norm: Any) -> Tensor:
    with dispatch.trying("layer_norm", "kernel"):
        return ops.layer_norm(x, norm.weight, norm.bias, norm.eps)


def folded_row(part: str, D: int, B: int, N: int, kernel: str = "folded_linear") -> Row:
    """qkv or fc1 of a prepared block."""
    act, columns = ("gelu", 4 * D) if part == "fc1" else ("none", 3 * D)
    after = F.gelu if part == "fc1" else lambda t: t

    def variants(given: Any) -> Variants:
        def parts() -> tuple[Any, Any, Tensor]:
            block = given["block"]
            norm, linear = (block.norm1, block.attn.qkv) if part == "qkv" else (block.norm2, block.mlp.fc1)
            return norm, linear, given["x"]

        def stock() -> Callable[[], Tensor]:
            norm, linear, x = parts()
            return lambda: after(
                F.linear(F.layer_norm(x, (D,), norm.weight, norm.bias, norm.eps), linear.weight, linear.bias)
            )

        def ours_and_cublas() -> Callable[[], Tensor]:
            norm, linear, x = parts()
            return lambda: after(F.linear(normed(x, norm), linear.weight, linear.bias))

        def alone() -> Callable[[], Tensor]:
            _, linear, x = parts()
            return lambda: F.linear(x, linear.weight, linear.bias)

        found: Variants = {"stock": stock, "our norm, cuBLAS": ours_and_cublas, "(cuBLAS alone)": alone}
        for config in products(B * N, columns, D):
            if config.kernel == "tiles":
                found[words(config.as_dict())] = lambda config=config: trying(
                    kernel, config, lambda: getattr(given["folded"], part)(given["x"], given["pieces"], act)
                )
        return found

    return Row(f"prepared {part} D{D} B{B} N{N}", lambda: block_of(D, B, N), variants)


def added_row(part: str, D: int, B: int, N: int, kernel: str = "added_linear") -> Row:
    """proj or fc2 of a prepared block."""
    K = D if part == "proj" else 4 * D

    def variants(given: Any) -> Variants:
        def parts() -> tuple[Any, Tensor, Tensor]:
            block = given["block"]
            linear = block.attn.proj if part == "proj" else block.mlp.fc2
            return linear, given["x" if part == "proj" else "hidden"], given["residual"]

        def stock() -> Callable[[], Tensor]:
            linear, x, residual = parts()
            return lambda: residual + F.linear(x, linear.weight, linear.bias)

        def addmm() -> Callable[[], Tensor]:
            linear, x, residual = parts()
            both = (residual + linear.bias).view(-1, D)
            return lambda: torch.addmm(both, x.view(-1, K), linear.weight.t()).view(B, N, D)

        def in_place() -> Callable[[], Tensor]:
            linear, x, residual = parts()
            both = residual.clone().view(-1, D)
            return lambda: both.addmm_(x.view(-1, K), linear.weight.t())

        found: Variants = {"stock": stock, "addmm of residual and bias": addmm, "(addmm_ in place)": in_place}
        for config in products(B * N, D, K):
            def of(config: Product = config) -> Callable[[], Any]:
                _, x, residual = parts()
                return trying(kernel, config, lambda: getattr(given["folded"], part)(x, residual)[0])

            found[words(config.as_dict())] = of
        return found

    return Row(f"prepared {part} D{D} B{B} N{N}", lambda: block_of(D, B, N), variants)


# attention

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
LONGEST = {"short": 272, "head": 256}


def sdpa(qkv: Tensor, backend: SDPBackend) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention_rows(H: int, B: int, N: int = 197, D: int = 64, directions: str = "forward backward") -> list[Row]:
    scale, programs = D**-0.5, B * H * -(-N // 64) / MULTIPROCESSORS

    def inputs() -> dict[str, Tensor]:
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, device=DEVICE, generator=generator).to(DTYPE)  # noqa: E731
        return {"qkv": draw(B, N, 3, H, D), "grad": draw(B, N, H * D)}

    def listed(table: list[Any], more: Iterable[Config]) -> list[Config]:
        found = dict.fromkeys([*tuning.candidates(table, 16, D, N, programs), *more])
        return [config for config in found if LONGEST.get(config.kernel, N) >= N]

    def forward(given: Any) -> Variants:
        found: Variants = {
            f"SDPA {name}": lambda backend=backend: partial(sdpa, given["qkv"], backend)
            for name, backend in BACKENDS.items()
        }
        for config in listed(tuning.FORWARD[ARCH], FORWARD):
            found[words(config.as_dict())] = lambda config=config: trying(
                "attention", config, lambda: torch.ops.vitfast.attention_qkv(given["qkv"], scale)[0]
            )
        return found

    def backward(given: Any) -> Variants:
        def by(backend: SDPBackend) -> Callable[[], Any]:
            with torch.enable_grad():
                leaf = given["qkv"].detach().requires_grad_()
                out = sdpa(leaf, backend)
            return partial(torch.autograd.grad, out, leaf, given["grad"], retain_graph=True)

        found: Variants = {f"SDPA {name}": partial(by, backend) for name, backend in BACKENDS.items()}
        for config in listed(tuning.BACKWARD[ARCH], BACKWARD):
            def of(config: Config = config) -> Callable[[], Any]:
                if "out" not in given:
                    with dispatch.trying("attention", "stock"), torch.no_grad():
                        given["out"], given["lse"] = torch.ops.vitfast.attention_qkv(given["qkv"], scale)
                kept = (given["grad"], given["qkv"], given["out"], given["lse"], scale)
                return trying("attention_backward", config, lambda: torch.ops.vitfast.attention_qkv_backward(*kept))

            found[words(config.as_dict())] = of
        return found

    ways = {"forward": forward, "backward": backward}
    return [Row(f"attention {way} H{H} B{B} N{N} D{D}", inputs, ways[way]) for way in directions.split()]


# every other op, as models call it


def model_calls(name: str, B: int, training: bool) -> list[Row]:
    """The calls of a model, without those of attention and those with one token of an image."""
    rows = []
    for call in kernel_calls([config_for(name)], (B,), DTYPE, training):
        if call.op.startswith("attention") or (len(call.likes()[0].shape) == 3 and call.likes()[0].shape[1] == 1):
            continue

        def inputs(call=call) -> tuple[Any, ...]:
            return FAMILIES[call.op].draw(call, torch.Generator(DEVICE).manual_seed(0))

        def variants(given: Any, call=call) -> Variants:
            family = FAMILIES[call.op]
            configs = list(family.configs(call, DEVICE))
            if call.op in ("linear", "mlp", "mlp_backward"):
                configs += [config.as_dict() for config in (MANY[:4] if B >= 64 else FEW[:6])]
            found: Variants = {"stock": lambda: lambda: present(family.stock(given))}
            for config in configs:
                found.setdefault(
                    words(config) or "built-in",
                    lambda config=config: lambda: present(family.with_config(given, config)),
                )
            return found

        rows.append(Row(f"{name} {call}", inputs, variants))
    return rows


def model_rows(name: str, B: int, training: bool = False) -> list[Row]:
    """Whole models, to see what the parts come to; without what takes a compiler minutes."""
    import timm

    def inputs() -> dict[str, Any]:
        torch.manual_seed(0)
        ours, theirs = vitfast.create_model(name), timm.create_model(name)
        theirs.load_state_dict(ours.state_dict())
        models = {key: m.train(training).to(DEVICE, DTYPE) for key, m in (("ours", ours), ("timm", theirs))}
        images = torch.randn(B, 3, 224, 224, device=DEVICE, dtype=DTYPE)
        return models | {"images": images, "labels": torch.randint(0, 1000, (B,), device=DEVICE)}

    def step(given: Any, which: str) -> Callable[[], Any]:
        model = given[which]
        if not training:
            return lambda: model(given["images"])
        parameters = list(model.parameters())

        def run() -> Any:
            loss = F.cross_entropy(model(given["images"]).float(), given["labels"])
            return loss.detach(), *torch.autograd.grad(loss, parameters)[-4:]

        return run

    def variants(given: Any) -> Variants:
        found: Variants = {
            "timm": lambda: step(given, "timm"), "ours": lambda: step(given, "ours"),
            "ours, stock operators": lambda: under("stock", step(given, "ours")),
        }  # fmt: skip
        if not training:
            def prepared() -> Callable[[], Any]:
                model = vitfast.prepare(given["ours"])
                return lambda: model(given["images"])

            found["ours, prepared"] = prepared
        return found

    kind = "training" if training else "inference"
    return [Row(f"{kind} {name} B{B}", inputs, variants, grad=training)]


def attention() -> list[Row]:
    rows = [row for H, B in ((12, 256), (6, 256), (12, 64), (12, 8), (3, 64)) for row in attention_rows(H, B)]
    for H, B, N, D in ((12, 64, 577, 64), (16, 64, 257, 64), (16, 64, 729, 72), (16, 64, 257, 80), (6, 64, 1370, 64),
                       (12, 4, 577, 64)):  # fmt: skip
        rows += attention_rows(H, B, N, D)
    for B, N in ((1, 197), (1, 577), (1, 1370)):
        rows += attention_rows(12, B, N)
    return rows


def prepared() -> list[Row]:
    sizes = [(768, B) for B in (256, 64, 8, 1)] + [(384, B) for B in (256, 64, 8, 1)]
    sizes += [(192, 256), (192, 64), (192, 1), (1024, 64), (1024, 8)]
    makers = (folded_row, "qkv"), (added_row, "proj"), (folded_row, "fc1"), (added_row, "fc2")
    return [make(part, D, B, 197) for D, B in sizes for make, part in makers]


def layers() -> list[Row]:
    rows = []
    for name, B, training in (
        (BASE, 256, True), (NAMES[384], 256, True), (BASE, 32, True), (BASE, 64, False), (BASE, 8, False),
        (BASE, 1, False), (NAMES[192], 256, True), (NAMES[384], 64, False), (NAMES[384], 8, False),
        (NAMES[384], 1, False), (NAMES[192], 64, False), (NAMES[192], 1, False), (NAMES[1024], 64, True),
    ):  # fmt: skip
        known = {row.name for row in rows}
        rows += [row for row in model_calls(name, B, training) if row.name not in known]
    return rows


def models() -> list[Row]:
    rows = [row for name, B in ((BASE, 256), (BASE, 64), (BASE, 1), (NAMES[384], 256)) for row in model_rows(name, B)]
    return rows + model_rows(BASE, 128, training=True)


SETS: dict[str, Callable[[], list[Row]]] = {
    "attention": attention, "prepared": prepared, "layers": layers, "models": models,
}  # fmt: skip
