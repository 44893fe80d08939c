"""Hugging Face's models with weights like trained ones, small, and the same models patched."""

import copy

import torch
import transformers
from test_ops import Recorder
from test_parity_timm import RATIO, gradients_not_worse, not_worse, products
from timm_pair import MASSIVE
from torch import nn

import vitfast

SIZES = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 8,
         "num_labels": 10}  # fmt: skip
CLASSES = {"ViT": "ViT", "DeiT": "DeiT", "DINOv2": "Dinov2", "registers": "Dinov2WithRegisters"}
MLP = {"ViT": {"intermediate_size": 256}, "DeiT": {"intermediate_size": 256}, "DINOv2": {"mlp_ratio": 2},
       "registers": {"mlp_ratio": 2}}  # fmt: skip
# family, what differs from its defaults; `drop_path_rate` where there is one
MODELS = {
    "ViT": {}, "DeiT": {}, "DINOv2": {}, "registers": {},
    "ViT eager": {"attn_implementation": "eager"},
    "DeiT eager": {"attn_implementation": "eager"},
    "DINOv2 eager": {"attn_implementation": "eager"},
    "registers eager": {"attn_implementation": "eager"},
    "ViT no biases": {"qkv_bias": False, "layer_norm_eps": 1e-3},
    "ViT gelu_new": {"hidden_act": "gelu_new"},
    "ViT gelu_python": {"hidden_act": "gelu_python"},
    "ViT gelu_pytorch_tanh": {"hidden_act": "gelu_pytorch_tanh"},
    "ViT gelu_python_tanh": {"hidden_act": "gelu_python_tanh"},
    "ViT quick_gelu": {"hidden_act": "quick_gelu"},
    "ViT silu": {"hidden_act": "silu"},
    "DINOv2 SwiGLU": {"use_swiglu_ffn": True, "layer_norm_eps": 1e-3},
    "registers SwiGLU": {"use_swiglu_ffn": True, "qkv_bias": False},
    "DINOv2 four heads": {"num_attention_heads": 4},
}  # fmt: skip
KINDS = ("attention", "norm", "mlp")


def build(name, batch=3, massive=True, train=True, **changes):
    """A classifier and images for it that are exact in bf16."""
    family = name.split(" ")[0]
    own = SIZES | MLP[family] | MODELS[name] | changes
    implementation = own.pop("attn_implementation", "sdpa")
    if family in ("ViT", "DeiT"):
        own.pop("drop_path_rate", None)
    config = getattr(transformers, f"{CLASSES[family]}Config")(**own)
    config._attn_implementation = implementation
    model = getattr(transformers, f"{CLASSES[family]}ForImageClassification")(config)
    images = torch.randn(batch, 3, 32, 32).bfloat16().float()
    return make_trained_like(model, images, massive).train(train), images


def layers_of(model):
    return [module for module in model.modules() if type(module).__name__.endswith("Layer")]


@torch.no_grad()
def make_trained_like(model, images, massive=True):
    """As `timm_pair.make_trained_like`, under transformers' names."""
    for name, p in model.named_parameters():
        owner, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if kind == "lambda1":
            p.uniform_(-2, 0).copy_(10**p)
        elif kind.endswith(("token", "tokens", "embeddings")):
            p.normal_(std=0.5)
        elif kind == "bias":
            p.normal_(std=0.3)
        elif isinstance(owner, (nn.Linear, nn.Conv2d)):
            p.normal_(std=0.7 * p[0].numel() ** -0.5)
        else:
            p.normal_(std=0.4).exp_()
            p[:: max(p.numel() // 4, 1)] = 10
    for layer in layers_of(model):
        for inner in layer.children():
            if isinstance(inner, nn.LayerNorm):
                inner.weight[MASSIVE] = 0.1
        if hasattr(layer, "layer_scale2"):
            layer.layer_scale2.lambda1[MASSIVE] = 1
    hooks = [layer.mlp.register_forward_pre_hook(_write) for layer in layers_of(model) if massive]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.copy_(p.bfloat16())
    return model


def _write(mlp, args):
    """One hidden unit that is open for the three tokens that fit it best, and writes 1e3 into one channel there."""
    gate, last = (mlp.fc1, mlp.fc2) if hasattr(mlp, "fc1") else (mlp.gate_proj, mlp.down_proj)
    best = (args[0] @ gate.weight[0]).flatten().topk(4).values
    gate.weight[0] *= 4 / (best[0] - best[3])
    gate.bias[0] = -4 * best[3] / (best[0] - best[3])
    last.weight[MASSIVE] = 0
    last.weight[MASSIVE, 0] = 1
    channel = mlp.forward(args[0])[..., MASSIVE]
    last.weight[MASSIVE, 0] = 1e3 / (channel.amax() - channel.amin())


def run(model, images, cotangent=None, **keywords):
    """Logits, and the gradients by name of their product with `cotangent`; the same draws for every model."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(images, **keywords).logits
    out.backward(torch.randn_like(out) if cotangent is None else cotangent.to(out.dtype))
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def ops_in(model, images, **keywords):
    """Names of the ops that a call runs, each as often as it is called."""
    with Recorder() as recorder:
        model(images, **keywords)
    return [str(func).split(".")[1] for func, *_ in recorder.calls]


def pair(name, **keywords):
    """A model, its patched copy, images."""
    stock, images = build(name, **keywords)
    patched = copy.deepcopy(stock)
    vitfast.patch(patched).require(*KINDS)
    return stock, patched, images


def same_gradients(found, expected, rtol=1e-3):
    assert found.keys() == expected.keys()
    for at, ref in expected.items():
        # exactly 0, but for rounding: softmax does not see what all keys have in common
        if not at.endswith("k_proj.bias"):
            assert (found[at] - ref).norm() <= rtol * ref.norm(), at


class Case:
    """A model, its patched copy, and what the model computes in fp64."""

    def __init__(self, name, **keywords):
        self.stock, self.patched, self.images = pair(name, **keywords)
        self.ref = copy.deepcopy(self.stock).double()
        with torch.no_grad():
            self.cotangent = torch.randn_like(self.stock(self.images).logits).bfloat16()
        self.out, self.grads = run(self.ref, self.images.double(), self.cotangent)

    def as_exact_as_stock(self, dtype):
        """Output and every gradient, of one run in `dtype`."""
        images = self.images.to(dtype)
        with products(dtype):
            low, grads_low = run(self.stock.to(dtype), images, self.cotangent)
            out, grads = run(self.patched.to(dtype), images, self.cotangent)
        not_worse(out, self.out, low, "output")
        gradients_not_worse(grads, self.grads, grads_low, RATIO[dtype])
