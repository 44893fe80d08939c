"""Models for tests of prepared blocks, and how one of their two forms is forced."""

import contextlib

import torch
from torch import nn

import vitfast
from vitfast.choose import dispatch
from vitfast.inference import prepare
from vitfast.ops import _launch, prepared_block

SIZES = {"image_size": 24, "patch_size": 8, "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128, "num_classes": 7}
DEEP = {"dim": 32, "depth": 40, "mlp_dim": 64}
CONFIGS = {
    "plain": {},
    "registers and LayerScale": {"register_tokens": 3, "layer_scale": 0.5},
    "mean of all tokens, tanh": {"pool": "mean", "activation": "gelu_tanh"},
    "qk norm, RMS": {"qk_norm": True, "norm": "rms"},
    "gated": {"mlp": "swiglu_packed", "activation": "silu"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norm inside of the MLP": {"mlp_norm": True},
    "pooled by attention": {"pool": "map"},
}


def model_of(dtype, device="cpu", **config):
    torch.manual_seed(0)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**SIZES | config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p += 1.0
    return model.to(device, dtype)


def wide_of(model):
    """The same model in fp64 on the CPU, to be changed as `model` was before."""
    wide = vitfast.ViT.from_config(model.config).eval().double()
    for block, other in zip(wide.blocks, model.blocks, strict=True):
        if type(other.mlp.norm) is nn.LayerNorm and type(block.mlp.norm) is nn.Identity:
            block.mlp.norm = nn.LayerNorm(other.mlp.norm.normalized_shape, eps=other.mlp.norm.eps).double().eval()
    wide.load_state_dict({name: t.double().cpu() for name, t in model.state_dict().items()})
    return wide


class Forms:
    """Which form each block took: `deferred` of them that with deferred biases, where `takes` says so of the i-th."""

    def __init__(self, monkeypatch, takes=lambda i: True):
        self.takes, self.asked, self.deferred = takes, 0, 0
        self.real = prepared_block.defers
        monkeypatch.setattr(prepared_block, "defers", self._defers)
        # where there is no kernel, stock operators take the place of each: so the form's algebra runs in bf16 too
        monkeypatch.setattr(prepare, "folds", lambda device: True)

    def _defers(self, x, *rest):
        taken = bool(x.numel()) and self.takes(self.asked)
        if taken and _launch.may_be_kernels(x):
            with dispatch.backend("kernel", op="prepared_block"):
                taken = self.real(x, *rest)
        self.asked, self.deferred = self.asked + 1, self.deferred + taken
        return taken

    @contextlib.contextmanager
    def off(self):
        """The five kernels."""
        takes, self.takes = self.takes, lambda i: False
        yield
        self.takes = takes
