"""What `load` can be asked for, of weights of every origin: image size, channels, classes, patch, dtype."""

import pytest
import torch
from test_load import filled

import vitfast
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.layout import written
from vitfast.weights.resample import adapt_input_channels, resample_patch_embed, resample_pos_embed

SMALL = dict(image_size=32, patch_size=8, dim=64, depth=2, heads=4, mlp_dim=96, num_classes=5)
HEADLESS = dict(num_classes=0)
CLIP = dict(pre_norm=True, norm_eps=1e-5, activation="quick_gelu")
REGISTERS = dict(layer_scale=1.0, register_tokens=2, pos_embed="patches")
SIGLIP = dict(class_token=False, pool="map", activation="gelu_tanh", num_classes=0)
VIT_PYTORCH = dict(input_norm=True, norm_eps=1e-5, qkv_bias=False, dynamic_image_size=True)
# origin -> (fields of a model that it can be of, what has to be given, how it resamples)
ORIGINS = {
    "timm": ({}, {"heads": 4}, "timm"),
    "hf-vit": ({}, {"heads": 4, "norm_eps": 1e-6}, "hf"),
    "hf-deit": (dict(distillation_token=True), {"heads": 4, "norm_eps": 1e-6}, "hf"),
    "hf-dinov2": (dict(layer_scale=1.0) | HEADLESS, {"heads": 4}, "hf"),
    "hf-dinov2-reg": (REGISTERS | HEADLESS, {"heads": 4}, "timm"),
    "hf-clip": (CLIP, {"heads": 4, "activation": "quick_gelu"}, "hf"),
    "hf-siglip": (SIGLIP, {"heads": 4}, "hf"),
    "openai-clip": (CLIP, {"heads": 4, "activation": "quick_gelu"}, "timm"),
    "google": (dict(activation="gelu_tanh"), {}, "google"),
    "torchvision": ({}, {"heads": 4}, "torchvision"),
    "vit-pytorch": (VIT_PYTORCH, {"heads": 4}, None),
    "dinov2": (dict(layer_scale=1.0) | HEADLESS, {"heads": 4}, "dinov2"),
    "dinov2-reg": (REGISTERS | HEADLESS, {"heads": 4}, "timm"),
    "mmpretrain": ({}, {"heads": 4}, None),
    "deit3": (dict(layer_scale=1e-5, pos_embed="patches"), {"heads": 4}, None),
}
# what a layout's own files have besides, and by which they are told from others
SIGNS = {"dinov2": {"mask_token": torch.zeros(1, 64)}, "dinov2-reg": {"mask_token": torch.zeros(1, 64)}}
OPTIONS = {
    "nothing": {},
    "larger images": {"image_size": 48},
    "smaller rectangles": {"image_size": (16, 24), "resampling": "timm"},
    "other classes": {"num_classes": 7},
    "no classes": {"num_classes": 0},
    "grey images": {"channels": 1},
    "six channels": {"channels": 6},
    "larger patches": {"patch_size": 16, "image_size": 64},
    "half precision": {"dtype": torch.bfloat16},
}


def source_of(origin):
    """A model, and its weights under the names of `origin`."""
    fields, given, mode = ORIGINS[origin]
    model = filled(vitfast.ViT.from_config(vitfast.ViTConfig(**SMALL | fields)))
    if origin in ("openai-clip", "hf-clip") and model.num_classes:
        model.head.bias.data.zero_()
    layout = next(layout for layout in LAYOUTS if layout.name == origin)
    inner = max(layout.inner, key=len)
    state = written(layout, model.state_dict(), model.config)
    state = {name[1:] if name.startswith("/") else inner + name: v for name, v in state.items()}
    return (
        model,
        state | {inner + name: v for name, v in SIGNS.get(origin, {}).items()},
        given,
        mode or layout.resampling,
    )


def refused(origin, model, options):
    """Of vit-pytorch's architecture neither pixels in rows nor sliced positions are changed."""
    return model.config.input_norm and options.keys() & {"channels", "patch_size"}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("origin", ORIGINS)
@torch.no_grad()
def test_option_is_forgotten_or_changes_more_than_it_says(origin, option):
    model, state, given, mode = source_of(origin)
    options = OPTIONS[option]
    if refused(origin, model, options):
        with pytest.raises(NotImplementedError, match="must stay.*vit-pytorch's projection"):
            vitfast.load(state, **given, **options)
        return
    ours = vitfast.load(state, **given, **options)
    assert ours.load_report.layout == origin
    expected = model.config.replace(**{name: v for name, v in options.items() if name not in ("dtype", "resampling")})
    for name in ("image_size", "patch_size", "channels", "num_classes", "activation", "norm_eps", "pool", "heads"):
        assert getattr(ours.config, name) == getattr(expected, name), name
    mode, dtype = options.get("resampling", mode), options.get("dtype", torch.float32)
    new_head = options.get("num_classes", model.num_classes) != model.num_classes
    for name, value in ours.state_dict().items():
        assert value.dtype == dtype
        own = model.state_dict().get(name)
        if name.startswith("head") and new_head:
            assert not value.any()
            continue
        if name == "pos_embed" and model.config.grid_size != ours.config.grid_size:
            prefix = model.config.num_prefix_tokens if model.config.pos_embed == "all" else 0
            rows = own if own.dim() == 3 else own[None]
            own = resample_pos_embed(rows, ours.config.grid_size, model.config.grid_size, prefix, mode=mode)
            own = own.reshape(value.shape)
        if name == "patch_embed.proj.weight" and "channels" in options:
            own = adapt_input_channels(own, options["channels"])
        if name == "patch_embed.proj.weight" and "patch_size" in options:
            own = resample_patch_embed(own, (16, 16))
        assert torch.equal(value, own.to(dtype)), name
    assert bool(ours.load_report.changed) == (
        option not in ("nothing", "half precision") and (new_head or "num_classes" not in options)
    )
    images = torch.randn(2, ours.config.channels, *ours.config.image_size, dtype=dtype)
    out = ours(images)
    assert out.isfinite().all()
    if option == "grey images":
        as_grey = model(images.expand(-1, 3, -1, -1))
        assert (out - as_grey).norm() <= 1e-4 * as_grey.norm()
    if option == "six channels":
        twice = ours(images[:, :3].repeat(1, 2, 1, 1))
        assert (twice - model(images[:, :3])).norm() <= 1e-4 * twice.norm()


def test_larger_images_of_vit_pytorch_get_positions_that_it_does_not_have():
    model, state, given, _ = source_of("vit-pytorch")
    assert vitfast.load(state, **given).config.dynamic_image_size
    with pytest.raises(ValueError, match="positions"):
        vitfast.load(state, **given)(torch.randn(1, 3, 64, 64))


def test_a_field_that_is_none_is_taken():
    _, state, given, _ = source_of("timm")
    with pytest.raises(TypeError, match="colour"):
        vitfast.load(state, **given, colour="red")
    with pytest.raises(ValueError, match="image_size"):
        vitfast.load(state, **given, image_size=33)
    with pytest.raises(ValueError, match="resampling must be one of"):
        vitfast.load(state, **given, image_size=64, resampling="nearest")
