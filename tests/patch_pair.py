"""timm's VisionTransformers with weights like trained ones, small, and the same models patched."""

import copy
import types
from functools import partial

import timm
import torch
from test_ops import Recorder
from test_parity_timm import RATIO, gradients_not_worse, not_worse, products
from timm.layers import Attention, GluMlp, RmsNorm, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from timm_pair import make_trained_like, names_of, run
from torch import nn

import vitfast

WIDTH = {"embed_dim": 128, "num_heads": 2}
# the families of timm_pair that differ in modules; head dims as they are where they are not 64
NAMED = {
    "vit": WIDTH, "distilled": WIDTH, "deit3": WIDTH, "dinov2_reg4": WIDTH, "dinov2_giant": WIDTH,
    "siglip_map": {"embed_dim": 144, "num_heads": 2}, "siglip_gap": WIDTH, "clip": WIDTH,
    "aimv2": {"embed_dim": 256, "num_heads": 2}, "beit3": WIDTH, "radio": WIDTH, "reg4_gap": WIDTH,
    "no_positions": WIDTH, "qk_norm": WIDTH, "test_vit2": {}, "test_vit3": {}, "test_vit4": {},
}  # fmt: skip
# what no name of timm has
BUILT = {
    "all norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "init_values": 0.1},
    "RMS norms": {"qk_norm": True, "scale_attn_norm": True, "norm_layer": RmsNorm, "init_values": 0.1},
    "torch's norms": {"qk_norm": True, "norm_layer": partial(nn.LayerNorm, eps=1e-5)},
    "torch's RMS norms": {"norm_layer": nn.RMSNorm},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "SwiGLU": {"mlp_layer": SwiGLU, "scale_mlp_norm": True},
    "packed SwiGLU": {"mlp_layer": SwiGLUPacked},
    "packed SwiGLU, norm": {"mlp_layer": SwiGLUPacked, "scale_mlp_norm": True},
    "GEGLU": {"mlp_layer": partial(GluMlp, gate_last=False), "act_layer": "gelu"},
    "tanh": {"act_layer": "gelu_tanh"},
    "quick": {"act_layer": "quick_gelu"},
    "silu": {"act_layer": nn.SiLU},
    "wide heads": {},
}
MODELS = (*NAMED, *BUILT)


def build(name, batch=3, massive=True, train=True, **changes):
    """A model and images for it that are exact in bf16."""
    with torch.device("meta"):
        if name in BUILT:
            sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "num_classes": 10, "embed_dim": 64, "num_heads": 2}
            model = VisionTransformer(**sizes | BUILT[name] | changes)
            for block in model.blocks if name == "wide heads" else ():
                block.attn = Attention(64, 2, attn_head_dim=80, qkv_bias=True, attn_drop=block.attn.attn_drop.p)
        else:
            named, keywords = names_of(name, **NAMED.get(name, {}) | changes)
            model = timm.create_model(named, **keywords)
    images = torch.randn(batch, 3, *model.patch_embed.img_size).bfloat16().float()
    return make_trained_like(model.to_empty(device="cpu"), images, massive).train(train), images


class Case:
    """A model, its patched copy, and what the model computes in fp64."""

    def __init__(self, name, **keywords):
        self.stock, self.images = build(name, **keywords)
        self.patched = copy.deepcopy(self.stock)
        vitfast.patch(self.patched).require("attention", "norm", "mlp")
        self.ref = copy.deepcopy(self.stock).double()
        with torch.no_grad():
            self.cotangent = torch.randn_like(self.stock(self.images)).bfloat16()
        self.out, self.grads = run(self.ref, self.images.double(), self.cotangent)

    def as_exact_as_stock(self, dtype):
        """Output and every gradient, of one run in `dtype`."""
        images = self.images.to(dtype)
        with products(dtype):
            low, grads_low = run(self.stock.to(dtype), images, self.cotangent)
            out, grads = run(self.patched.to(dtype), images, self.cotangent)
        not_worse(out, self.out, low, "output")
        gradients_not_worse(grads, self.grads, grads_low, RATIO[dtype])


def small(train=False, batch=3, **changes):
    """timm's test_vit and its images."""
    return build("test_vit", batch=batch, massive=False, train=train, img_size=32, init_values=0.5, **changes)


def patched_copy(model, **parts):
    copied = copy.deepcopy(model)
    vitfast.patch(copied, **parts)
    return copied


def ops_in(model, *images):
    """Names of vitfast's ops that a call runs in blocks; whether one cuts the patches is decided by dtype."""
    return ops_of(lambda: model(*images))[1] - {"patch_embed"}


def ops_of(function):
    """What a function gives, and the names of vitfast's ops that it runs."""
    with Recorder() as recorder:
        out = function()
    return out, {str(func).split(".")[1] for func, *_ in recorder.calls}


def state_of(model):
    """What a patch must leave as it is: all tensors by name, bit for bit, and what each module holds in which order."""
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    return tensors, [(name, type(m), list(m.__dict__), list(m._parameters)) for name, m in model.named_modules()]


def equal(found, expected):
    """Bit for bit, gradients of parameters that have none included."""
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        return [equal(found[name], expected[name]) for name in expected]
    if isinstance(expected, (tuple, list)):
        assert len(found) == len(expected)
        return [equal(*both) for both in zip(found, expected, strict=True)]
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        return torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert found == expected


def near(found, expected, rtol=1e-5):
    """To rounding in fp32; where a mask, a weight or a module is another one, results differ by far more."""
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert (found - expected).norm() <= rtol * expected.norm()


def results_of(model, images):
    """By name: the output, and the gradients that there are."""
    out, grads = run(model, images)
    return {"out": out} | {name: grad for name, grad in grads.items() if grad is not None}


def same(found, expected, rtol=1e-4):
    assert found.keys() == expected.keys() and len(expected) > 1
    for name, other in expected.items():
        one = found[name]
        # a key's bias shifts all logits of a query: its gradient is rounding
        assert "k_norm.bias" in name or (one - other).norm() <= rtol * other.norm() + 1e-6, name


def own_forward(module):
    """Give the module another forward, as people do; returns what takes it back."""
    stock = module.forward
    module.forward = types.MethodType(lambda self, *args, **how: 2 * stock(*args, **how), module)
    return lambda: delattr(module, "forward")
