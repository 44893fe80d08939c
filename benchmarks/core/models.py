"""Whole models against everybody's: inference, and the training step without its optimizer.

Each function makes a `Case` from plain values. All variants of a row have the same weights. Training is forward,
cross-entropy, backward; its results are the logits and the gradients of a few parameters, first and last in the
backward's way. The loss itself is one number, which is as exact as luck has it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from vitfast.bench import compilers, rivals, work
from vitfast.bench.case import DTYPES, Case, Function, Tensors, Variant, Work
from vitfast.bench.factory import one_of, positive, recorded
from vitfast.bench.rivals import Network
from vitfast.bench.steps import Setting, in_stock_operators

GROUPS = ("all", "eager", "compiled", "autotuned")
VITS = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_tiny_patch16_224")
CNNS = ("resnet50", "mobilenetv3_large_100")
VIT_PYTORCH = "vit-pytorch"
BATCHES = (1, 8, 64, 256)
STOCK = "stock PyTorch"
CHECK_IMAGES = 8

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
    one_of("group", group, GROUPS)
    # a pair that came through JSON is a list
    options = {name: tuple(v) if isinstance(v, list) else v for name, v in (options or {}).items()}
    config = vitfast.config_for(model, **options)
    if setting.training and not config.num_classes:
        options["num_classes"] = 1000
        config = vitfast.config_for(model, **options)
    key = ("vit", model, tuple(sorted(options.items())))
    weights = partial(_weights, key, partial(vitfast.create_model, model, **options))
    ours: Make = lambda: rivals.of_vitfast(model, options, weights())  # noqa: E731
    timm: Make = lambda: rivals.of_timm(model, options, weights())  # noqa: E731
    has_timm = importlib.util.find_spec("timm") is not None

    variants = {} if has_timm else {STOCK: Variant(lambda: in_stock_operators(setting.eager(ours())))}
    variants["timm"] = Variant(lambda: setting.eager(timm()), needs=("timm",))
    variants |= _ours(setting, ours, group)
    if group in ("all", "eager"):
        variants["torchvision"] = Variant(
            lambda: setting.eager(rivals.of_torchvision(config, weights())), needs=("torchvision",)
        )
        variants["Hugging Face"] = Variant(
            lambda: setting.eager(rivals.of_hugging_face(config, weights())), needs=("transformers",)
        )
    variants |= _compiled(setting, "timm", timm, group, autotune_s, config.image_size)
    return _case(
        model, setting, group, config.image_size, config.num_classes or config.dim, variants,
        _truth(setting, key, timm if has_timm else ours, not has_timm),
        shape={"tokens": _tokens(config), "dim": config.dim, "depth": config.depth, "heads": config.heads},
        count=_work(config, setting), gradients=3, param_count=work.parameters(config),
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
    one_of("group", group, GROUPS)
    positive(size=size, patch=patch, dim=dim, depth=depth, heads=heads, classes=classes)
    sizes = dict(image_size=size, patch_size=patch, num_classes=classes, dim=dim, depth=depth, heads=heads)
    make = partial(vitfast.ViT, **sizes, mlp_dim=4 * dim)
    with torch.device("meta"):
        config = make().config
    key = (VIT_PYTORCH, tuple(sizes.items()))
    weights = partial(_weights, key, make)
    has_theirs = importlib.util.find_spec("vit_pytorch") is not None

    def ours() -> Network:
        return Network(rivals.filled(make, weights()), rivals.watched(config))

    def theirs() -> Network:
        return rivals.of_vit_pytorch(config, weights())

    variants = {} if has_theirs else {STOCK: Variant(lambda: in_stock_operators(setting.eager(ours())))}
    variants[VIT_PYTORCH] = Variant(lambda: setting.eager(theirs()), needs=("vit_pytorch",))
    variants |= _ours(setting, ours, group)
    variants |= _compiled(setting, VIT_PYTORCH, theirs, group, autotune_s, config.image_size, ("vit_pytorch",))
    return _case(
        VIT_PYTORCH, setting, group, config.image_size, classes, variants,
        _truth(setting, key, theirs if has_theirs else ours, not has_theirs),
        shape={"tokens": _tokens(config), "dim": dim, "depth": depth, "heads": heads},
        count=_work(config, setting), gradients=3, param_count=work.parameters(config),
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

    def compiled(made: Network) -> Function:
        if setting.device.type != "cpu" or setting.training or setting.autocast:
            return setting.compiled(made)
        example = torch.zeros(batch, 3, size, size, dtype=DTYPES[dtype])
        return compilers.frozen(setting.place(made).module, example.contiguous(memory_format=torch.channels_last))

    def first() -> Function:
        function = setting.eager(network())
        return lambda images, images_last, *labels: function(images, *labels)

    variants = {"timm": Variant(first)}
    if group in ("all", "eager"):
        variants["timm channels_last"] = Variant(lambda: last(setting.eager))
    if group in ("all", "compiled"):
        variants["timm compiled"] = Variant(lambda: last(compiled))
    exact = _truth(setting, ("cnn", model), network)
    return _case(
        model, setting, group, (size, size), meta.num_classes, variants,
        lambda images, images_last, *labels: exact(images, *labels), shape={}, count=_counted(meta, setting, size),
        gradients=2, both_layouts=True, param_count=parameter_count(meta),
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
        variants=variants, baseline=baseline, yardstick=baseline, work=count, check_images=CHECK_IMAGES,
        notes={"model": model, "group": group, **notes},
    )  # fmt: skip


def _ours(setting: Setting, make: Make, group: str) -> dict[str, Variant]:
    def prepared() -> Function:
        module = setting.place(make()).module
        fast = vitfast.prepare(module, dtype=DTYPES[setting.dtype], threads=None)
        return lambda images: fast(images)

    variants = {"vitfast": Variant(lambda: setting.eager(make()), ours=True)}
    if not setting.training and not setting.autocast:
        variants["vitfast prepared"] = Variant(prepared, ours=True)
    if group in ("all", "compiled") and setting.device.type != "cpu":
        variants["vitfast compiled"] = Variant(lambda: setting.compiled(make()), ours=True)
    return variants


def _compiled(
    setting: Setting, name: str, make: Make, group: str, autotune_s: float, image_size: tuple[int, int],
    needs: tuple[str, ...] = ("timm",),
) -> dict[str, Variant]:  # fmt: skip
    """The compilers of that model which are of use on the device."""
    found = {}
    cpu = setting.device.type == "cpu"
    if group in ("all", "compiled"):
        if cpu and not setting.training and not setting.autocast:
            found |= _cpu_compilers(setting, name, make, image_size, needs)
        else:
            found[f"{name} compiled"] = Variant(lambda: setting.compiled(make()), needs=needs)
        if not cpu:
            found[f"{name} reduce-overhead"] = Variant(
                lambda: setting.compiled(make(), "reduce-overhead", own_graphs=True), needs=needs, graph=False
            )
    if group in ("all", "autotuned") and not cpu:
        found[f"{name} max-autotune"] = Variant(
            lambda: setting.compiled(make(), "max-autotune", own_graphs=True), needs=needs, graph=False,
            apart=autotune_s,
        )  # fmt: skip
    return found


def _cpu_compilers(
    setting: Setting, name: str, make: Make, image_size: tuple[int, int], needs: tuple[str, ...]
) -> dict[str, Variant]:
    def example(dtype: torch.dtype) -> Tensor:
        return torch.zeros(setting.batch, 3, *image_size, dtype=dtype)

    def wide() -> nn.Module:
        # both compile for a dtype from a model in fp32
        return make().module.eval().requires_grad_(False)

    def frozen() -> Function:
        return compilers.frozen(setting.place(make()).module, example(DTYPES[setting.dtype]))

    def onnx_runtime() -> Function:
        if setting.dtype != "fp32":
            raise NotImplementedError("fp32 only")
        return compilers.onnx_runtime(wide(), example(torch.float32))

    def openvino() -> Function:
        return compilers.openvino(wide(), example(torch.float32), setting.dtype)

    return {
        f"{name} compiled": Variant(frozen, needs=needs),
        "ONNX Runtime": Variant(onnx_runtime, needs=(*needs, "onnx", "onnxscript", "onnxruntime")),
        "OpenVINO": Variant(openvino, needs=(*needs, "openvino")),
    }


_WEIGHTS: dict[tuple, dict[str, Tensor]] = {}


def _weights(key: tuple, make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Weights for what `make` makes, kept until those of another key are wanted."""
    if key not in _WEIGHTS:
        with torch.device("meta"):
            shapes = make().state_dict()
        _WEIGHTS.clear()
        _WEIGHTS[key] = rivals.random_weights(shapes)
    return _WEIGHTS[key]


_TRUTHS: dict[tuple, tuple[Tensors, Tensors]] = {}


def _truth(setting: Setting, key: tuple, make: Make, in_stock: bool = False) -> Function:
    """The results in fp64, remembered, since rows of other batches and dtypes begin with the same images."""
    key = (*key, setting.mode, str(setting.device))

    def run(*given: Tensor) -> Tensor | Tensors:
        n = len(given[0])
        known, results = _TRUTHS.get(key, ((), ()))
        enough = known and (len(known[0]) == n or (not setting.training and len(known[0]) > n))
        if not enough or not all(torch.equal(a[:n], b) for a, b in zip(known, given, strict=True)):
            function = setting.exact(make())
            out = (in_stock_operators(function) if in_stock else function)(*given)
            results = out if isinstance(out, tuple) else (out,)
            _TRUTHS[key] = given, results
        return results if setting.training else results[0][:n]

    return run


def _tokens(config: vitfast.ViTConfig) -> int:
    return config.num_patches + config.num_prefix_tokens


def _work(config: vitfast.ViTConfig, setting: Setting) -> Work:
    return work.model(
        config, setting.batch, setting.dtype, training=setting.training, image_dtype=setting.kept_in,
        weight_dtype=setting.kept_in,
    )  # fmt: skip


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
    flops = counter.get_total_flops() * setting.batch
    if setting.training:
        return Work(3 * flops, 2 * setting.batch * per_image + 3 * weights)
    return Work(flops, setting.batch * per_image + weights)


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
        for group, mode, batch, dtype, cast in (
            (g, m, b, d, a) for g in groups for m in modes for b in batches for d in dtypes for a in autocast
        ):
            if not (cast and dtype == "fp32"):
                yield partial(factory, batch=batch, mode=mode, dtype=dtype, autocast=cast, device=device, group=group)
