"""Whole models against everybody's: inference, and the training step without its optimizer.

Each factory makes a `Case` from plain values. All variants of a row have the same weights. Training is forward,
cross-entropy, backward; its results are the logits and the gradients of a few parameters, first and last in the
backward's way. The loss itself is one number, which is as exact as luck has it.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vitfast
from benchmarks.core import compilers, rivals, work
from benchmarks.core.apart import recorded
from benchmarks.core.rivals import Network
from benchmarks.core.steps import Setting
from vitfast.check.case import DTYPES, Case, Function, Tensors, Variant, Work

GROUPS = ("all", "eager", "compiled", "autotuned")
VITS = ("vit_base_patch16_224", "vit_small_patch16_224", "vit_large_patch16_224", "vit_tiny_patch16_224")
CNNS = ("resnet50", "mobilenetv3_large_100")
VIT_PYTORCH = "vit-pytorch"
BATCHES = (1, 8, 64, 256)
# rms error of the logits that is accepted of a model in int8, as a share of their rms: with the random weights of these
# rows ViTs are some 2 % off, and in bf16 up to 1 %
INT8_ERROR = 0.05

Make = Callable[[], Network]


@recorded
def vit(
    *, model: str, batch: int, mode: str = "inference", dtype: str = "bf16", autocast: bool = False,
    device: str = "cpu", group: str = "all", size: int | None = None, depth: int | None = None,
    autotune_s: float = 300.0,
) -> Case:  # fmt: skip
    """One of timm's ViTs, or vit-pytorch's, whose results are not timm's: it has norms around the patch projection and
    no bias in attention. The baseline is the eager model of that package.

    Args:
        model: a name of `vitfast.list_models`, or 'vit-pytorch' for a ViT-B/16. To be trained, a model without
            classifier gets one of 1000 classes.
        dtype: of everything, or with `autocast` what autocast computes in, with weights and images in fp32.
        group: which rivals besides the baseline: 'eager', 'compiled', 'autotuned' (max-autotune, on a CPU among the
            compiled too) or 'all'.
        size, depth: of images in pixels and of blocks, where they are not the model's own.
        autotune_s: how long max-autotune may take, in a process of its own.

    Raises:
        ModuleNotFoundError: the package is not installed.
    """
    setting = Setting(mode, dtype, autocast, torch.device(device), batch)
    if model == VIT_PYTORCH:
        name, package = VIT_PYTORCH, "vit_pytorch"
        sizes = dict(dim=768, depth=depth or 12, heads=12, mlp_dim=3072)
        make = partial(vitfast.ViT, image_size=size or 224, patch_size=16, num_classes=1000, **sizes)
    else:
        name = package = "timm"
        options = {what: n for what, n in (("img_size", size), ("depth", depth)) if n is not None}
        if setting.training and not vitfast.config_for(model, **options).num_classes:
            options["num_classes"] = 1000
        make = partial(vitfast.create_model, model, **options)
    importlib.import_module(package)
    with torch.device("meta"):
        meta = make()
    config = meta.config
    key = (model, *make.keywords.items())
    weights = partial(weights_of, key, meta)

    def ours() -> Network:
        return Network(rivals.filled(make, weights()), rivals.watched(config))

    def theirs() -> Network:
        if model == VIT_PYTORCH:
            return rivals.of_vit_pytorch(config, weights())
        return rivals.of_timm(model, options, config, weights())

    cpu = setting.device.type == "cpu"
    variants = {
        name: Variant(lambda: setting.eager(theirs())),
        "vitfast": Variant(lambda: setting.eager(ours()), ours=True),
    }
    if not setting.training and not autocast:

        def prepared(graphs: bool) -> Callable[..., Any]:
            return vitfast.prepare(setting.place(ours()).module, dtype=DTYPES[dtype], threads=None, graphs=graphs)

        variants["vitfast prepared"] = Variant(lambda: prepared(graphs=False), ours=True)
        if group in ("all", "eager") and not cpu:
            variants["vitfast prepared, its graphs"] = Variant(lambda: prepared(graphs=True), ours=True, graph=False)
    if group in ("all", "compiled") and not cpu:
        variants["vitfast compiled"] = Variant(lambda: setting.compiled(ours()), ours=True)
    if group in ("all", "eager") and model != VIT_PYTORCH:
        for other, needs, of in (
            ("torchvision", "torchvision", rivals.of_torchvision),
            ("Hugging Face", "transformers", rivals.of_hugging_face),
        ):
            variants[other] = Variant(lambda of=of: setting.eager(of(config, weights())), needs=(needs,))
    if group in ("all", "compiled"):
        variants |= _compiled(setting, name, theirs, config.image_size)
    # on a CPU it has few products to time, and takes no longer than without
    if group in (("all", "autotuned", "compiled") if cpu else ("all", "autotuned")) and (
        setting.plain_on_cpu or not cpu
    ):
        example = partial(torch.zeros, batch, 3, *config.image_size, dtype=DTYPES[dtype])
        variants[f"{name} max-autotune"] = Variant(
            lambda: setting.compiled_best(theirs(), example, autotuned=True), graph=False,
            apart=None if cpu else autotune_s,
        )  # fmt: skip
    return case_of_vit(model, setting, group, variants, truth_of(setting, key, theirs), meta)


def case_of_vit(
    name: str, setting: Setting, group: str, variants: Mapping[str, Variant], truth: Function, meta: nn.Module
) -> Case:
    """meta: a `vitfast.ViT` of these sizes, on no device."""
    config = meta.config
    shape = {
        "tokens": config.num_patches + config.num_prefix_tokens, "dim": config.dim, "depth": config.depth,
        "heads": config.heads,
    }  # fmt: skip
    count = work.model(
        config, setting.batch, setting.dtype, training=setting.training, image_dtype=setting.kept_in,
        weight_dtype=setting.kept_in,
    )  # fmt: skip
    return case_of(
        name, setting, group, config.image_size, config.num_classes or config.dim, variants, truth, meta, count,
        gradients=3, shape=shape,
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
    make = partial(timm.create_model, model)
    with torch.device("meta"):
        meta = make().eval()
    matrices = [name for name, p in meta.named_parameters() if p.dim() > 1]

    def network(**layout: Any) -> Network:
        module = rivals.filled(make, rivals.random_weights(meta.state_dict(), gain=2**0.5))
        return Network(module.to(**layout), ((matrices[0],), (matrices[-1],)))

    # by its weights a convolution knows in which layout to compute
    last = partial(network, memory_format=torch.channels_last)
    variants = {"timm": Variant(lambda: setting.eager(network()))}
    if group in ("all", "eager"):
        variants["timm channels_last"] = Variant(lambda: setting.eager(last()))
    if group in ("all", "compiled"):
        example = partial(torch.zeros, batch, 3, size, size, dtype=DTYPES[dtype])
        variants["timm compiled"] = Variant(lambda: setting.compiled_best(last(), example))
    truth = truth_of(setting, (model, size), network)
    return case_of(
        model, setting, group, (size, size), meta.num_classes, variants, truth, meta, _counted(meta, setting, size),
        gradients=2, by_image=not setting.training,
    )  # fmt: skip


def case_of(
    model: str, setting: Setting, group: str, image_size: tuple[int, int], classes: int,
    variants: Mapping[str, Variant], truth: Function, meta: nn.Module, count: Work, *, gradients: int,
    shape: Mapping[str, int] | None = None, by_image: bool = True,
) -> Case:  # fmt: skip
    """`by_image`: whether an image's logits are its own, as they are not where batch norm is trained."""

    def inputs(generator: torch.Generator) -> Tensors:
        # image by image, so that a larger batch begins with the images of a smaller one
        images, labels = [], []
        for _ in range(setting.batch):
            images.append(torch.randn(3, *image_size, generator=generator, device=generator.device))
            labels.append(torch.randint(classes, (), generator=generator, device=generator.device))
        stacked = rivals.exact(torch.stack(images)).to(DTYPES[setting.kept_in])
        return (stacked, torch.stack(labels)) if setting.training else (stacked,)

    height, width = image_size
    size = {"size": height} if height == width else {"height": height, "width": width}
    baseline = next(iter(variants))
    return Case(
        # an own name for rows of other rivals, so that files of several runs keep both
        kind="model", name=model if group in ("all", "eager") else f"{model} {group}", mode=setting.mode,
        shape=size | (shape or {}), batch=setting.batch, dtype=setting.dtype, autocast=setting.autocast,
        device=setting.device, inputs=inputs, reference=truth, cut=lambda given, n: tuple(t[:n] for t in given),
        per_image=(by_image,) + (False,) * (gradients * setting.training), variants=variants, baseline=baseline,
        yardstick=baseline, work=count,
        notes={"model": model, "group": group, "param_count": sum(p.numel() for p in meta.parameters())},
    )  # fmt: skip


def _compiled(setting: Setting, name: str, make: Make, image_size: tuple[int, int]) -> dict[str, Variant]:
    """The compilers of that model which are of use on the device."""
    example = partial(torch.zeros, setting.batch, 3, *image_size)

    def wide() -> nn.Module:
        # both compile for a dtype from a model in fp32
        return make().module.eval().requires_grad_(False)

    best = partial(example, dtype=DTYPES[setting.dtype])
    found = {f"{name} compiled": Variant(lambda: setting.compiled_best(make(), best))}
    if setting.plain_on_cpu:
        # the one knows fp32 and int8 on a CPU, the other computes in the row's dtype what it does not in int8
        needed, fp32 = ("onnx", "onnxscript", "onnxruntime"), " fp32" * (setting.dtype != "fp32")
        for int8 in (False, True):
            more = {"tolerance": INT8_ERROR} if int8 else {}
            found["ONNX Runtime" + (" int8" if int8 else fp32)] = Variant(
                lambda int8=int8: compilers.onnx_runtime(wide(), example(), int8), needs=needed, **more
            )
            found["OpenVINO" + " int8" * int8] = Variant(
                lambda int8=int8: compilers.openvino(wide(), example(), setting.dtype, int8),
                needs=("openvino", "nncf") if int8 else ("openvino",), **more,
            )  # fmt: skip
    elif setting.device.type != "cpu":
        found[f"{name} reduce-overhead"] = Variant(lambda: setting.compiled(make(), "reduce-overhead"), graph=False)
    return found


# of one key at a time
_WEIGHTS: dict[tuple, dict[str, Tensor]] = {}
_TRUTHS: dict[tuple, tuple[Tensors, Tensor | Tensors]] = {}


def _remembered(memory: dict[tuple, Any], key: tuple, make: Callable[[], Any]) -> Any:
    if key not in memory:
        memory.clear()
        memory[key] = make()
    return memory[key]


def weights_of(key: tuple, meta: nn.Module) -> dict[str, Tensor]:
    """Random ones for `meta`, remembered under `key`."""
    return _remembered(_WEIGHTS, key, lambda: rivals.random_weights(meta.state_dict()))


def truth_of(setting: Setting, key: tuple, make: Make) -> Function:
    """The results in fp64, remembered: what is judged of rows of other batches and dtypes are the same images."""
    key = (*key, setting.mode, str(setting.device))

    def run(*given: Tensor) -> Tensor | Tensors:
        def computed() -> tuple[Tensors, Tensor | Tensors]:
            return given, setting.exact(make())(*given)

        before, results = _remembered(_TRUTHS, key, computed)
        if not all(map(torch.equal, before, given)):
            before, results = _TRUTHS[key] = computed()
        return results

    return run


def _counted(meta: nn.Module, setting: Setting, size: int) -> Work:
    """Of any model, by running it without data: products as torch counts them; images, weights, logits and gradients
    as bytes. A backward is twice a forward, because torch counts a grouped convolution's as if it had no groups.
    """
    image = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        logits = meta(image)
    wide, parameters = DTYPES[setting.kept_in].itemsize, sum(p.numel() for p in meta.parameters())
    per_image, weights = (image.numel() + logits.numel()) * wide, parameters * wide
    times = 3 if setting.training else 1
    moved = setting.batch * per_image * (1 + setting.training) + weights * times
    return Work(times * counter.get_total_flops() * setting.batch, moved)


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
    """
    size = {} if image_size is None else {"size": image_size}
    for name in names or VITS:
        factory = partial(cnn, **size) if name in CNNS else partial(vit, depth=depth, autotune_s=autotune_s, **size)
        for group, mode, batch, dtype, cast in itertools.product(groups, modes, batches, dtypes, autocast):
            if not (cast and dtype == "fp32"):
                yield partial(
                    factory, model=name, batch=batch, mode=mode, dtype=dtype, autocast=cast, device=device, group=group
                )
