"""Tracers and compilers of torch other than `torch.compile`: each works, or says once and clearly that it does not."""

import warnings

import pytest
import torch
from pairwise import product
from timm.models._features_fx import FeatureGraphNet
from timm_pair import build_pair
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import vitfast
from vitfast import ops

FLAVOURS = ["vit", "distilled", "dinov2_reg4", "siglip_gap", "siglip_map", "clip", "aimv2", "beit3", "vit_pytorch"]
FORMS = [*FLAVOURS, "dynamic", "other_stem", "hooked", "exportable"]
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


class Around(nn.Module):
    """A module of somebody's own with a ViT inside."""

    def __init__(self, vit):
        super().__init__()
        self.vit = vit

    def forward(self, x):
        return self.vit(x * 2.0) + 1.0


class OtherStem(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inside = model.patch_embed
        self.proj, self.patch_size, self.grid_size = self.inside.proj, self.inside.patch_size, self.inside.grid_size

    def forward(self, images):
        return self.proj(images).flatten(2).transpose(1, 2)


def model_and_images(flavour):
    if flavour == "vit_pytorch":
        keywords = dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128)
        return vitfast.ViT(**keywords).eval(), torch.randn(3, 3, 32, 32)
    if flavour in FLAVOURS:
        _, ours, images = build_pair(flavour, batch=3, massive=False)
        return ours.eval(), images
    kw = dict(img_size=32, depth=2, num_classes=10, dynamic_img_size=flavour == "dynamic")
    model = vitfast.create_model("vit_tiny_patch16_224", **kw).eval()
    if flavour == "other_stem":
        model.patch_embed = OtherStem(model)
    if flavour == "hooked":
        for module in model.modules():
            module.register_forward_hook(lambda module, args, out: None)
    return model, torch.randn(3, 3, 32, 32)


def close(found, expected):
    assert (found - expected).norm() <= 1e-4 * expected.norm()


def hf_style(model):
    """A tracer as Hugging Face's and optimum's: proxies of a class of its own, with other values to fall back on."""

    class Remembering(torch.fx.Proxy):
        @property
        def shape(self):
            return torch.Size((2, 3, 32, 32))

    class Tracer(torch.fx.Tracer):
        def proxy(self, node):
            return Remembering(node, self)

    return Tracer().trace(model)


SYMBOLIC = {
    "symbolic_trace": torch.fx.symbolic_trace,
    "inside": lambda model: torch.fx.symbolic_trace(Around(model)),
    "features": lambda model: torch.fx.symbolic_trace(model, concrete_args={"attn_mask": None}),
    "hf_style": hf_style,
    "torchvision": lambda model: create_feature_extractor(model, ["norm"]),
    "torchvision_names": get_graph_node_names,
    "timm": lambda model: FeatureGraphNet(model, [0, 1]),
    "block": lambda model: torch.fx.symbolic_trace(model.blocks[0]),
}
FX = "torch.fx.*forward_intermediates.*torch.export"


@pytest.mark.parametrize("how", SYMBOLIC)
@pytest.mark.parametrize("form", FORMS)
def test_fx_fails_somewhere_inside_or_warns_of_a_mask(form, how):
    model, _ = model_and_images(form)
    vitfast.set_exportable(form == "exportable")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            if how == "block" and form == "hooked":
                # a block that runs its modules' own forwards has control flow of its own
                return
            with pytest.raises(NotImplementedError, match=FX):
                SYMBOLIC[how](model)
    finally:
        vitfast.set_exportable(False)


@pytest.mark.parametrize("method", ["forward_features", "forward_intermediates", "get_intermediate_layers", "embed"])
def test_fx_through_another_method_fails_somewhere_inside(method):
    model, _ = model_and_images("vit")

    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = model

        def forward(self, x):
            return getattr(self.vit, method)(x)

    with pytest.raises(NotImplementedError, match=FX):
        torch.fx.symbolic_trace(Calls())


def test_fx_of_an_op_fails_somewhere_inside():
    weight, bias = torch.randn(8, 8), torch.randn(8)
    stem = torch.randn(8, 3, 4, 4)
    for call in (
        lambda t: ops.linear(t, weight, bias),
        lambda t: ops.layer_norm(t, bias, bias, 1e-6),
        lambda t: ops.add_layer_norm(t, t, bias, bias, 1e-6),
        lambda t: ops.mlp(t, bias, bias, weight, bias, weight, bias),
        lambda t: ops.attention(t, t, t),
        lambda t: ops.attention_qkv(t),
        lambda t: ops.attention_weights(t, t),
        lambda t: ops.attention_varlen(t, t, t, torch.tensor([0, 1], dtype=torch.int32)),
        lambda t: ops.patch_embed(t, stem),
        lambda t: ops.patch_embed_packed(t, stem),
        lambda t: ops.patch_embed_packed([t], stem),
    ):
        with pytest.raises(NotImplementedError, match=FX):
            torch.fx.symbolic_trace(call)


def test_leaf_that_the_error_names_does_not_work():
    model, images = model_and_images("vit")
    leaf = {"leaf_modules": [vitfast.ViT]}
    found = create_feature_extractor(Around(model), {"vit": "out"}, tracer_kwargs=leaf)(images)["out"]
    close(found, model(images * 2.0))


@every_flavour
def test_script_fails_somewhere_inside(flavour):
    model, images = model_and_images(flavour)
    for module in (model, Around(model), nn.Sequential(nn.Identity(), Around(model))):
        with pytest.raises(NotImplementedError, match=r"torch\.jit\.script.*torch\.jit\.trace"):
            torch.jit.script(module)
    close(torch.jit.trace(Around(model), images)(images), Around(model)(images))


def test_script_of_a_prepared_model_names_what_does_not_work_either():
    prepared = vitfast.prepare(model_and_images("vit")[0], threads=None)
    with pytest.raises(NotImplementedError, match="use the original"):
        torch.jit.script(prepared)


@product(flavour=FLAVOURS, strict={"loose": False, "strict": True}, strength=1)
def test_export_fails_or_computes_something_else(flavour, strict):
    model, images = model_and_images(flavour)
    program = torch.export.export(model, (images,), strict=strict, dynamic_shapes={"x": {0: torch.export.Dim("batch")}})
    with torch.no_grad():
        for batch in (images, images[:2]):
            close(program.module()(batch), model(batch))


@every_flavour
def test_draft_export_fails_or_computes_something_else(flavour):
    """It takes an op's optional tensor that is None for one that the op wrote to, and raised."""
    model, images = model_and_images(flavour)
    program = torch.export.draft_export(model, (images,))
    assert program._report.successful()
    with torch.no_grad():
        close(program.module()(images), model(images))


@product(flavour=FLAVOURS, mode=("real", "fake", "symbolic"), strength=1)
def test_make_fx_fails_or_computes_something_else(flavour, mode):
    """Of the model's function of its weights, forward and backward."""
    model, images = model_and_images(flavour)
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def step(weights, images):
        weights = {name: p.requires_grad_() for name, p in weights.items()}
        out = torch.func.functional_call(model, weights, (images,))
        return out, torch.autograd.grad(out.square().sum(), list(weights.values()), allow_unused=True)

    out, grads = make_fx(step, tracing_mode=mode)(weights, images)(weights, images)
    expected, expected_grads = step(weights, images)
    close(out, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        assert (grad is None) == (other is None)
        if grad is not None:
            assert (grad - other).norm() <= 1e-4 * other.norm() + 1e-6


@every_flavour
def test_hooks_of_a_summary_miss_a_module(flavour):
    """As torchinfo and torchsummary put one on every module, and read shapes."""
    model, images = model_and_images(flavour)
    expected, shapes = model(images), {}
    handles = [
        module.register_forward_hook(lambda module, args, out, name=name: shapes.update({name: out}))
        for name, module in model.named_modules()
    ]
    close(model(images), expected)
    for handle in handles:
        handle.remove()
    quiet = {name for name, module in model.named_modules() if name not in shapes}
    # timm calls no dropout of attention weights, nor of its positions where it has none
    assert quiet <= {name for name, module in model.named_modules() if isinstance(module, (nn.Dropout, nn.Identity))}
