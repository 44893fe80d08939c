"""Images and weights that do not fit: a clear error or the right answer."""

import copy
import re

import numpy as np
import pytest
import torch

import vitfast

SMALL = dict(image_size=32, patch_size=8, num_classes=5, dim=48, depth=2, heads=3)
FLAVOURS = {
    "token": {},
    "mean": {"pool": "mean", "class_token": False},
    "map": {"pool": "map", "register_tokens": 2, "layer_scale": 0.1},
    "clip": {"pre_norm": True, "activation": "quick_gelu", "pos_embed": "patches"},
    "swiglu": {"mlp": "swiglu", "activation": "silu", "norm": "rms", "patch_norm": True, "pos_embed": "none"},
    "distilled": {"distillation_token": True, "qk_norm": True},
    "scale_norms": {"attn_norm": True, "mlp_norm": True},
    "vit_pytorch": {"input_norm": True, "norm_eps": 1e-5},
}
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


def build(flavour="token", **fields):
    return vitfast.ViT.from_config(vitfast.ViTConfig(**SMALL | FLAVOURS[flavour] | fields)).eval()


def images(batch=2, channels=3, height=32, width=32):
    return torch.randn(batch, channels, height, width)


WRONG = {
    "one channel": (images(channels=1), ValueError, r"images must be \[B, 3, H, W\], got \[2, 1, 32, 32\]"),
    "channels last": (torch.randn(2, 32, 32, 3), ValueError, r"must be \[B, 3, H, W\], got \[2, 32, 32, 3\]"),
    "no batch dim": (torch.randn(3, 32, 32), ValueError, r"must be \[B, 3, H, W\], got \[3, 32, 32\]"),
    "video": (torch.randn(1, 3, 4, 32, 32), ValueError, r"must be \[B, 3, H, W\], got \[1, 3, 4, 32, 32\]"),
    "scalar": (torch.tensor(1.0), ValueError, r"must be \[B, 3, H, W\], got \[\]"),
    "too large": (images(height=40), ValueError, "must be 32x32, got 40x32.*dynamic_img_size.*set_input_size"),
    "no multiple": (images(width=33), ValueError, "must be 32x32, got 32x33"),
    "no pixels": (images(height=0, width=0), ValueError, "must be 32x32, got 0x0"),
    "uint8": (images().byte(), TypeError, "floating point tensor.*got torch.uint8"),
    "int64": (images().long(), TypeError, "floating point tensor.*got torch.int64"),
    "bool": (images() > 0, TypeError, "floating point tensor.*got torch.bool"),
    "complex": (images() + 0j, TypeError, "floating point tensor.*got torch.complex64"),
    "numpy": (images().numpy(), TypeError, "floating point tensor.*got ndarray"),
    "list": ([images()], TypeError, "floating point tensor.*got list"),
    "none": (None, TypeError, "floating point tensor.*got NoneType"),
}


@pytest.mark.parametrize("method", ["forward", "forward_features", "intermediates", "forward_intermediates"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("flavour", ["token", "swiglu", "vit_pytorch"])
def test_wrong_images_are_cropped_or_fail_somewhere_inside(flavour, wrong, method):
    """An image that a convolution would silently crop; an error from deep inside that says nothing about images."""
    given, error, said = WRONG[wrong]
    with pytest.raises(error, match=said):
        getattr(build(flavour), method)(given)


@pytest.mark.parametrize("flavour", ["token", "vit_pytorch"])
def test_images_that_no_patch_fits_are_cropped_where_sizes_are_dynamic(flavour):
    model = build(flavour, dynamic_image_size=True)
    for height, width in ((33, 32), (32, 20), (4, 8), (0, 8)):
        with pytest.raises(ValueError, match=rf"multiples of the patch 8x8, got {height}x{width}"):
            model(images(height=height, width=width))


def test_padding_is_of_another_size_or_at_another_side():
    """Only with dynamic_pad, at the right and the bottom, with zeros."""
    model = build(dynamic_image_size=True, dynamic_pad=True)
    for height, width in ((33, 32), (25, 12), (1, 1)):
        x = images(height=height, width=width)
        padded = torch.nn.functional.pad(x, (0, -width % 8, 0, -height % 8))
        assert torch.equal(model(x), model(padded))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@every_flavour
def test_dtype_of_images_and_weights_differ_without_a_clear_error(flavour, dtype):
    """Silent promotion of a whole model by one float64 image, or an error of a matmul."""
    model, x = build(flavour), images().to(dtype)
    name = str(dtype).removeprefix("torch.")
    if flavour == "vit_pytorch" and dtype is not torch.float64:
        # its first LayerNorm takes half precision beside fp32 weights
        torch.testing.assert_close(model(x), model(x.float()))
    else:
        with pytest.raises(ValueError, match=f"(?s)float32.*{name}|{name}.*float32"):
            model(x)
    # autocast casts half precision to its own dtype, and leaves fp64 alone
    if dtype is not torch.float64:
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).isfinite().all()


@every_flavour
def test_images_on_another_device_fail_somewhere_inside(flavour):
    with pytest.raises(ValueError, match="device.*(cpu.*meta|meta.*cpu)"):
        build(flavour)(images().to("meta"))
    with pytest.raises(ValueError, match="device.*(cpu.*meta|meta.*cpu)"):
        build(flavour).to("meta")(images())


@every_flavour
def test_empty_batch_fails_or_has_no_gradients(flavour):
    """The last, empty shard of a data set; DDP waits for ever for a gradient that is None."""
    model = build(flavour).train()
    x = images(batch=0).requires_grad_()
    out = model(x)
    assert out.shape == (0, 5)
    out.sum().backward()
    assert x.grad.shape == x.shape
    for name, p in model.named_parameters():
        assert p.grad is not None and not p.grad.any(), name
    assert model.forward_features(x).shape[0] == 0
    assert {tuple(t.shape[:1]) for t in model.intermediates(x).values()} == {(0,)}


@every_flavour
def test_nan_in_one_image_reaches_another(flavour):
    """One broken picture that spoils its batch: the others keep their bits."""
    model, x = build(flavour), images(batch=4)
    expected, tokens = model(x), model.forward_features(x)
    for bad in (float("nan"), float("inf"), -float("inf")):
        x[2, 1, 5, 5] = bad
        out = model(x)
        assert out[2].isnan().any()
        for found, clean in ((out, expected), (model.forward_features(x), tokens)):
            assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def strided(x):
    """The same images with other strides."""
    yield "channels last", x.contiguous(memory_format=torch.channels_last)
    yield "height and width swapped", x.transpose(2, 3).contiguous().transpose(2, 3)
    wide = torch.full((x.shape[0], 5, 40, 48), float("nan"))
    wide[:, 1:4, 3:35, 7:39] = x
    yield "a crop", wide[:, 1:4, 3:35, 7:39]
    yield "every other image", x.repeat_interleave(2, 0)[::2]
    offset = torch.cat([x.new_full((1,), float("nan")), x.flatten()])[1:].view_as(x)
    yield "an odd offset", offset


@every_flavour
def test_strides_of_images_change_the_result(flavour):
    """Channels-last images read as channels-first, a crop read past its edge; no bit may differ."""
    model, x = build(flavour), images()
    expected = model(x)
    for name, view in strided(x):
        assert torch.equal(view, x) and view.shape == x.shape
        assert torch.equal(model(view), expected), name
    one = x[:1].expand(3, -1, -1, -1)
    assert torch.equal(model(one), model(one.contiguous()))


@every_flavour
def test_grid_of_one_patch_fails(flavour):
    model = build(flavour, image_size=8)
    out = model(images(height=8, width=8))
    assert out.shape == (2, 5) and out.isfinite().all()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    if flavour != "vit_pytorch":
        assert model.forward_intermediates(images(height=8, width=8))[1][0].shape == (2, 48, 1, 1)


def test_depth_of_zero_fails():
    model = build(depth=0)
    assert model(images()).shape == (2, 5)
    assert model.forward_intermediates(images())[1] == []


def bad_state(model):
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    del state["blocks.0.attn.qkv.bias"], state["head.weight"]
    state["blocks.7.norm1.weight"] = state["extra"] = torch.zeros(3)
    state["pos_embed"] = torch.zeros(1, 99, 48)
    state["norm.weight"] = torch.zeros(())
    return state


LISTED = (
    "missing: blocks.0.attn.qkv.bias [144]", "missing: head.weight [5, 48]", "unexpected: blocks.7.norm1.weight",
    "unexpected: extra", "wrong shape: pos_embed must be [1, 17, 48], got [1, 99, 48]",
    "wrong shape: norm.weight must be [48], got []",
)  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
def test_keys_that_do_not_fit_are_listed_in_part_or_partly_loaded(assign):
    """torch copies what fits before it raises, and names wrong shapes apart from the rest."""
    model = build()
    before, state = copy.deepcopy(model.state_dict()), bad_state(model)
    with pytest.raises(RuntimeError) as raised:
        model.load_state_dict(state, assign=assign)
    said = str(raised.value)
    assert re.search("6 keys do not fit ViT; nothing was loaded", said)
    assert all(line in said for line in LISTED)
    with pytest.raises(RuntimeError, match="2 keys do not fit") as raised:
        model.load_state_dict(state, strict=False, assign=assign)
    assert all(line in str(raised.value) for line in LISTED[-2:])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_loose_loading_does_not_say_what_it_left():
    model = build()
    state = {key: torch.ones_like(value) for key, value in model.state_dict().items() if not key.startswith("head")}
    result = model.load_state_dict(state | {"extra": torch.zeros(1)}, strict=False)
    assert result.missing_keys == ["head.weight", "head.bias"] and result.unexpected_keys == ["extra"]
    assert (model.blocks[1].norm2.bias == 1).all()


@pytest.mark.parametrize("value", [np.zeros(48, np.float32), 3.0, None, [0.0] * 48], ids=lambda v: type(v).__name__)
def test_state_dict_of_something_else_is_partly_loaded(value):
    """Arrays and numbers among the tensors, as other frameworks save them."""
    model = build()
    before = copy.deepcopy(model.state_dict())
    state = {key: torch.zeros_like(tensor) for key, tensor in before.items()} | {"norm.weight": value}
    with pytest.raises((RuntimeError, TypeError), match="norm.weight"):
        model.load_state_dict(state)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_wrong_arguments_are_ignored():
    model, x = build(), images()
    for wrong in ("TOKENS", "max", 3):
        with pytest.raises(ValueError, match=f"pool_type must be one of .*, got {wrong!r}"):
            model.pool(model.forward_features(x), wrong)
        with pytest.raises(ValueError, match=f"global_pool must be one of .*, got {wrong!r}"):
            model.reset_classifier(3, wrong)
    with pytest.raises(ValueError, match="'map' needs a model built with it"):
        model.reset_classifier(3, "map")
    with pytest.raises(ValueError, match="output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")
    for wrong in (0, 3, -1, [2], [-3]):
        with pytest.raises(ValueError, match=r"indices must be between .*, got \[?-?\d"):
            model.forward_intermediates(x, wrong)
    with pytest.raises(ValueError, match="ViTConfig.image_size must be a multiple of patch_size"):
        model.set_input_size(32, patch_size=12)
    with pytest.raises(ValueError, match="ViTConfig.image_size must be a multiple"):
        model.set_input_size(33)
    with pytest.raises(ValueError, match="layout must be 'timm' or 'vit_pytorch', got 'jax'"):
        model.state_dict(layout="jax")
    with pytest.raises(TypeError, match="config must be a ViTConfig, got dict"):
        vitfast.ViT.from_config(SMALL)
    assert model.config.num_classes == 5 and model(x).shape == (2, 5)
