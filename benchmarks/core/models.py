"""Whole models against everybody's: inference, and the training step without its optimizer.

Each factory makes a `Case` from plain values. All variants of a row have the same weights. Training is forward,
cross-entropy, backward; its results are the logits and the gradients of a few parameters, first and last in the
backward's way. The loss itself is one number, which is as exact as luck has it.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from benchmarks.core import compilers, rivals, work
from benchmarks.core.case import one_of, positive, recorded
from benchmarks.core.rivals import Network
from benchmarks.core.steps import Setting, in_stock_operators
from vitfast.check.case import DTYPES, Case, Function, Tensors, Variant, Work

GROUPS = ("all", "eager", "compiled", "autotuned")
VITS = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_tiny_patch16_224")
CNNS = ("resnet50", "mobilenetv3_large_100")
VIT_PYTORCH = "vit-pytorch"
BATCHES = (1, 8, 64, 256)
STOCK = "stock PyTorch"

Make = Callable[[], Network]


@recorded
def vit(
    *, model: str, batch: int, mode: str = "inference", dtype: str = "bf16", autocast: bool = False,
    device: str = "cpu", group: str = "all", options: Mapping[str, Any] | None = None, autotune_s: float = 300.0,
) -> Case:  # fmt: skip
    """One of timm's ViTs. The baseline is timm's eager model; where timm is not installed, ours in stock operators.

    Args:
        model: a name of `vitfast.list_models`.
        dtype: of everything, or with `autocast` what autocast computes in, with weights and images in fp32.
        group: which rivals besides timm: 'eager', 'compiled', 'autotuned' (max-autotune) or 'all'.
        options: timm's keywords, such as img_size. To be trained, a model without classifier gets one of 1000 classes.
        autotune_s: how long max-autotune may take, in a process of its own.

    Raises:
        ValueError: an argument is not among what is possible.
    """
    setting = Setting(mode, dtype, autocast, torch.device(device), batch)
    # a pair that came through JSON is a list
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in (options or {}).items()}
    config = vitfast.config_for(model, **options)
    if setting.training and not config.num_classes:
        options["num_classes"] = 1000
        config = vitfast.config_for(model, **options)
    key = ("vit", model, tuple(sorted(options.items())))
    weights = partial(_weights, key, partial(vitfast.create_model, model, **options))
    others = {
        "torchvision": (lambda: rivals.of_torchvision(config, weights()), "torchvision"),
        "Hugging Face": (lambda: rivals.of_hugging_face(config, weights()), "transformers"),
    }
    return _vit(
        model, setting, group, config, key, lambda: rivals.of_vitfast(model, options, weights()), "timm", "timm",
        lambda: rivals.of_timm(model, options, weights()), others, autotune_s,
    )  # fmt: skip


@recorded
def vit_pytorch(
    *, batch: int, size: int = 224, patch: int = 16, dim: int = 768, depth: int = 12, heads: int = 12,
    classes: int = 1000, mode: str = "inference", dtype: str = "bf16", autocast: bool = False, device: str = "cpu",
    group: str = "all", autotune_s: float = 300.0,
) -> Case:  # fmt: skip
    """vit-pytorch's ViT in a row of its own, for its results are not timm's: it has norms around the patch projection
    and no bias in attention. Arguments otherwise as in `vit`.
    """
    setting = Setting(mode, dtype, autocast, torch.device(device), batch)
    positive(size=size, patch=patch, dim=dim, depth=depth, heads=heads, classes=classes)
    sizes = dict(image_size=size, patch_size=patch, num_classes=classes, dim=dim, depth=depth, heads=heads)
    make = partial(vitfast.ViT, **sizes, mlp_dim=4 * dim)
    with torch.device("meta"):
        config = make().config
    key = (VIT_PYTORCH, tuple(sizes.items()))
    weights = partial(_weights, key, make)
    return _vit(
        VIT_PYTORCH, setting, group, config, key,
        lambda: Network(rivals.filled(make, weights()), rivals.watched(config)), VIT_PYTORCH, "vit_pytorch",
        lambda: rivals.of_vit_pytorch(config, weights()), {}, autotune_s,
    )  # fmt: skip


def _vit(
    model: str, setting: Setting, group: str, config: vitfast.ViTConfig, key: tuple, ours: Make, their_name: str,
    package: str, theirs: Make, others: Mapping[str, tuple[Make, str]], autotune_s: float,
) -> Case:  # fmt: skip
    """Ours against the model that it stands for, whose package may be absent, and `others` by package."""
    one_of("group", group, GROUPS)
    cpu, installed = setting.device.type == "cpu", importlib.util.find_spec(package) is not None
    variants = {} if installed else {STOCK: Variant(lambda: in_stock_operators(setting.eager(ours())))}
    variants[their_name] = Variant(lambda: setting.eager(theirs()), needs=(package,))
    variants["vitfast"] = Variant(lambda: setting.eager(ours()), ours=True)
    if not setting.training and not setting.autocast:
        variants["vitfast prepared"] = Variant(lambda: _prepared(setting, ours()), ours=True)
    if group in ("all", "compiled") and not cpu:
        variants["vitfast compiled"] = Variant(lambda: setting.compiled(ours()), ours=True)
    if group in ("all", "eager"):
        for name, (make, needs) in others.items():
            variants[name] = Variant(lambda make=make: setting.eager(make()), needs=(needs,))
    if group in ("all", "compiled"):
        variants |= _compiled(setting, their_name, theirs, config.image_size, package)
    if group in ("all", "autotuned") and not cpu:
        variants[f"{their_name} max-autotune"] = Variant(
            lambda: setting.compiled(theirs(), "max-autotune", own_graphs=True), needs=(package,), graph=False,
            apart=autotune_s,
        )  # fmt: skip
    exact = _truth(setting, key, theirs if installed else ours)
    shape = {
        "tokens": config.num_patches + config.num_prefix_tokens, "dim": config.dim, "depth": config.depth,
        "heads": config.heads,
    }  # fmt: skip
    count = work.model(
        config, setting.batch, setting.dtype, training=setting.training, image_dtype=setting.kept_in,
        weight_dtype=setting.kept_in,
    )  # fmt: skip
    return _case(
        model, setting, group, config.image_size, config.num_classes or config.dim, variants,
        exact if installed else in_stock_operators(exact), shape=shape, count=count, gradients=3,
        param_count=work.parameters(config),
    )  # fmt: skip


@recorded
def cnn(
    *, model: str, batch: int, size: int = 224, mode: str = "inference", dtype: str = "bf16", autocast: bool = False,
    device: str = "cpu", group: str = "all",
) -> Case:  # fmt: skip
    """One of timm's convolutional networks, as a yardstick for ViTs; nothing in it is ours. Arguments as in `vit`.

    Raises:
        ModuleNotFoundError: timm is not installed.
    """
    import timm

    setting = Setting(mode, dtype, autocast, torch.device(device), batch)
    one_of("group", group, GROUPS)
    positive(size=size)
    make = partial(timm.create_model, model)
    with torch.device("meta"):
        meta = make()
    shapes = meta.state_dict()
    matrices = [name for name, p in meta.named_parameters() if p.dim() > 1]

    def network() -> Network:
        module = rivals.filled(make, rivals.random_weights(shapes, gain=2**0.5))
        return Network(module, ((matrices[0],), (matrices[-1],)))

    def last(run: Callable[[Network], Function]) -> Function:
        made = network()
        made.module.to(memory_format=torch.channels_last)
        function = run(made)
        # their images are the second input
        return lambda images, images_last, *labels: function(images_last, *labels)

    def first(function: Function) -> Function:
        return lambda images, images_last, *labels: function(images, *labels)

    def compiled(made: Network) -> Function:
        if not setting.plain_on_cpu:
            return setting.compiled(made)
        example = torch.zeros(batch, 3, size, size, dtype=DTYPES[dtype])
        return compilers.frozen(setting.place(made).module, example.contiguous(memory_format=torch.channels_last))

    variants = {"timm": Variant(lambda: first(setting.eager(network())))}
    if group in ("all", "eager"):
        variants["timm channels_last"] = Variant(lambda: last(setting.eager))
    if group in ("all", "compiled"):
        variants["timm compiled"] = Variant(lambda: last(compiled))
    return _case(
        model, setting, group, (size, size), meta.num_classes, variants,
        first(_truth(setting, ("cnn", model), network)), shape={}, count=_counted(meta, setting, size), gradients=2,
        both_layouts=True, param_count=parameter_count(meta),
        left_out="timm channels_last and compiled: images and weights are channels last from the start",
    )  # fmt: skip


def _case(
    model: str, setting: Setting, group: str, image_size: tuple[int, int], classes: int,
    variants: Mapping[str, Variant], truth: Function, *, shape: Mapping[str, int], count: Work, gradients: int,
    both_layouts: bool = False, **notes: Any,
) -> Case:  # fmt: skip
    def inputs(generator: torch.Generator) -> Tensors:
        # image by image, so that a larger batch begins with the images of a smaller one
        images, labels = [], []
        for _ in range(setting.batch):
            images.append(torch.randn(3, *image_size, generator=generator, device=generator.device))
            labels.append(torch.randint(classes, (), generator=generator, device=generator.device))
        stacked = rivals.exact(torch.stack(images)).to(DTYPES[setting.kept_in])
        given = (stacked, stacked.contiguous(memory_format=torch.channels_last)) if both_layouts else (stacked,)
        return (*given, torch.stack(labels)) if setting.training else given

    height, width = image_size
    size = {"size": height} if height == width else {"height": height, "width": width}
    baseline = next(iter(variants))
    return Case(
        # an own name for rows of other rivals, so that files of several runs keep both
        kind="model", name=model if group in ("all", "eager") else f"{model} {group}", mode=setting.mode,
        shape=size | shape, batch=setting.batch, dtype=setting.dtype, autocast=setting.autocast, device=setting.device,
        inputs=inputs, reference=truth, cut=lambda given, n: tuple(t[:n] for t in given),
        # with batch norm no image's logits are its own in training
        per_image=(not (both_layouts and setting.training),) + (False,) * (gradients * setting.training),
        variants=variants, baseline=baseline, yardstick=baseline, work=count,
        notes={"model": model, "group": group, **notes},
    )  # fmt: skip


def _prepared(setting: Setting, network: Network) -> Function:
    fast = vitfast.prepare(setting.place(network).module, dtype=DTYPES[setting.dtype], threads=None)
    return lambda images: fast(images)


def _compiled(setting: Setting, name: str, make: Make, image_size: tuple[int, int], package: str) -> dict[str, Variant]:
    """The compilers of that model which are of use on the device."""

    def example(dtype: str) -> Tensor:
        return torch.zeros(setting.batch, 3, *image_size, dtype=DTYPES[dtype])

    def wide() -> nn.Module:
        # both compile for a dtype from a model in fp32
        return make().module.eval().requires_grad_(False)

    def onnx_runtime() -> Function:
        if setting.dtype != "fp32":
            raise NotImplementedError("fp32 only")
        return compilers.onnx_runtime(wide(), example("fp32"))

    if setting.plain_on_cpu:
        return {
            f"{name} compiled": Variant(
                lambda: compilers.frozen(setting.place(make()).module, example(setting.dtype)), needs=(package,)
            ),
            "ONNX Runtime": Variant(onnx_runtime, needs=(package, "onnx", "onnxscript", "onnxruntime")),
            "OpenVINO": Variant(
                lambda: compilers.openvino(wide(), example("fp32"), setting.dtype), needs=(package, "openvino")
            ),
        }
    found = {f"{name} compiled": Variant(lambda: setting.compiled(make()), needs=(package,))}
    if setting.device.type != "cpu":
        found[f"{name} reduce-overhead"] = Variant(
            lambda: setting.compiled(make(), "reduce-overhead", own_graphs=True), needs=(package,), graph=False
        )
    return found


_WEIGHTS: dict[tuple, dict[str, Tensor]] = {}
_TRUTHS: dict[tuple, tuple[Tensors, Tensors]] = {}


def _weights(key: tuple, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights for what `make` makes, kept until those of another key are wanted."""
    if key not in _WEIGHTS:
        with torch.device("meta"):
            shapes = make().state_dict()
        _WEIGHTS.clear()
        _WEIGHTS[key] = rivals.random_weights(shapes)
    return _WEIGHTS[key]


def _truth(setting: Setting, key: tuple, make: Make) -> Function:
    """The results in fp64, remembered, since rows of other batches and dtypes begin with the same images."""
    key = (*key, setting.mode, str(setting.device))

    def run(*given: Tensor) -> Tensor | Tensors:
        n = len(given[0])
        known, results = _TRUTHS.get(key, ((), ()))
        enough = known and (len(known[0]) == n or (not setting.training and len(known[0]) > n))
        if not enough or not all(torch.equal(a[:n], b) for a, b in zip(known, given, strict=True)):
            out = setting.exact(make())(*given)
            results = out if isinstance(out, tuple) else (out,)
            _TRUTHS[key] = given, results
        return results if setting.training else results[0][:n]

    return run


def _counted(meta: nn.Module, setting: Setting, size: int) -> Work:
    """Of any model, by running it without data: products as torch counts them; images, weights, logits and gradients
    as bytes. A backward is twice a forward, because torch counts a grouped convolution's as if it had no groups.
    """
    model = copy.deepcopy(meta).eval()
    image = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = model(image)
    wide = DTYPES[setting.kept_in].itemsize
    per_image, weights = (image.numel() + logits.numel()) * wide, parameter_count(model) * wide
    times = 3 if setting.training else 1
    moved = setting.batch * per_image * (1 + setting.training) + weights * times
    return Work(times * counter.get_total_flops() * setting.batch, moved)


def parameter_count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def listed(
    names: Sequence[str] | None = None, *, device: str, dtypes: Sequence[str], batches: Sequence[int] = BATCHES,
    modes: Sequence[str] = ("inference",), groups: Sequence[str] = ("all",), autocast: Sequence[bool] = (False,),
    image_size: int | None = None, depth: int | None = None, autotune_s: float = 300.0,
) -> Iterator[Callable[[], Case]]:  # fmt: skip
    """Rows of the models named; each is made when it is called.

    Args:
        names: ViTs, `CNNS`, or 'vit-pytorch'. By default the usual ViTs at 224 pixels.
        image_size: in pixels, where it is not the model's own.
        depth: blocks of a ViT, where they are not as many as its own.

    Raises:
        ValueError: a name that is none of these.
    """
    size = {} if image_size is None else {"size": image_size}
    blocks = {} if depth is None else {"depth": depth}
    for name in names or VITS:
        if name in CNNS:
            factory = partial(cnn, model=name, **size)
        elif name == VIT_PYTORCH:
            factory = partial(vit_pytorch, autotune_s=autotune_s, **size, **blocks)
        else:
            options = blocks | ({} if image_size is None else {"img_size": image_size})
            factory = partial(vit, model=name, options=options, autotune_s=autotune_s)
        for group, mode, batch, dtype, cast in itertools.product(groups, modes, batches, dtypes, autocast):
            if not (cast and dtype == "fp32"):
                yield partial(factory, batch=batch, mode=mode, dtype=dtype, autocast=cast, device=device, group=group)
