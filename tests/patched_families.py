"""A small model of each library that `vitfast.patch` knows, for tests of what others do with a patched model."""

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import pytest
import timm
import torch
import transformers
import vit_pytorch
from test_parity_timm import gradients_not_worse, not_worse, relative
from timm_pair import make_trained_like
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.vision_transformer import VisionTransformer

from vitfast.check.acceptance import RMS_RATIO

DRAWS = {"drop_path": 0.2, "dropout": 0.1}


FUSED = ("linear", "attention_qkv", "linear", "mlp")
# where q, k and v are projected apart
APART = ("layer_norm", "attention", "linear", "mlp")


class Family(NamedTuple):
    """A model of a library.

    build: (drop_path, dropout, attention_dropout, depth) -> a model that gives a tensor, in training mode;
    blocks: those of a model; ops: of a forward of a block without dropout; last: of the model after its blocks;
    stem: whether a convolution cuts its patches.
    """

    build: Callable[..., nn.Module]
    blocks: Callable[[nn.Module], Sequence[nn.Module]]
    ops: tuple[str, ...] = FUSED
    last: tuple[str, ...] = ()
    stem: bool = True

    def all_ops(self, depth=2, stem=False):
        """Of a forward; stem: whether the convolution runs as an op, which in fp32 it does not in training."""
        return ["patch_embed"] * (stem and self.stem) + [*self.ops * depth, *self.last]


def timm_model(drop_path=0.0, dropout=0.0, attention_dropout=0.0, depth=2):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=64, num_heads=2, num_classes=10, init_values=0.1,
        drop_path_rate=drop_path, proj_drop_rate=dropout, attn_drop_rate=attention_dropout,
    )  # fmt: skip
    return make_trained_like(model, images(), massive=False)


class Logits(nn.Module):
    """A model of Hugging Face that gives a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def dinov2(drop_path=0.0, dropout=0.0, attention_dropout=0.0, depth=2):
    config = transformers.Dinov2Config(
        image_size=32, patch_size=16, hidden_size=64, num_hidden_layers=depth, num_attention_heads=2, mlp_ratio=4,
        num_labels=10, layerscale_value=0.1, use_mask_token=False,
        drop_path_rate=drop_path, attention_probs_dropout_prob=attention_dropout,
        hidden_dropout_prob=dropout,
    )  # fmt: skip
    return shaken(Logits(transformers.Dinov2ForImageClassification(config)))


def torchvision_model(drop_path=0.0, dropout=0.0, attention_dropout=0.0, depth=2):
    """It has no stochastic depth."""
    return shaken(
        VisionTransformer(
            image_size=32, patch_size=16, num_layers=depth, num_heads=2, hidden_dim=64, mlp_dim=256, num_classes=10,
            dropout=dropout, attention_dropout=attention_dropout,
        )
    )  # fmt: skip


def vit_pytorch_model(drop_path=0.0, dropout=0.0, attention_dropout=0.0, depth=2):
    """One rate for all its dropouts, and no stochastic depth."""
    return shaken(
        vit_pytorch.ViT(
            image_size=32, patch_size=16, num_classes=10, dim=64, depth=depth, heads=2, dim_head=32, mlp_dim=256,
            dropout=max(dropout, attention_dropout),
        )
    )  # fmt: skip


@torch.no_grad()
def shaken(model):
    """Weights that are exact in bf16, none of them 0 or 1 as they are made."""
    for p in model.parameters():
        p.add_(0.1 * torch.randn_like(p)).copy_(p.bfloat16())
    return model.train()


FAMILIES = {
    "timm": Family(timm_model, lambda model: model.blocks),
    "Hugging Face": Family(dinov2, lambda model: model.model.dinov2.encoder.layer, APART),
    "torchvision": Family(torchvision_model, lambda model: model.encoder.layers),
    # one module runs all blocks, and the norm
    "vit_pytorch": Family(vit_pytorch_model, lambda model: [model.transformer], last=("layer_norm",), stem=False),
}
# for tests in which one family shows what the others would, next to all of them for `make test-all`
one_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[pytest.mark.full] * (name != "timm")) for name in FAMILIES]
)
every_family = pytest.mark.parametrize("family", FAMILIES)


def images(batch=3, seed=1):
    """Exact in bf16."""
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return x.bfloat16().float()


def build(family="timm", **how):
    """The same model at each call, whatever was drawn before."""
    torch.manual_seed(0)
    return FAMILIES[family].build(**how)


def blocks_of(family, model):
    return FAMILIES[family].blocks(model)


class Ops(TorchDispatchMode):
    """Which ops of vitfast run inside: `with Ops() as ran: ...; ran.names`."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitfast":
            self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def ops_of(graph):
    """Which ops of vitfast are in a graph of torch.fx, those of its subgraphs included."""
    inner = [module for module in graph.owning_module.modules() if isinstance(module, torch.fx.GraphModule)]
    targets = [node.target for module in inner for node in module.graph.nodes]
    return [str(t).split(".")[1] for t in targets if str(t).startswith("vitfast.")]


class Runs:
    """A backend of torch.compile that notes the ops of each graph that runs.

    Attributes:
        graphs: those that were compiled; ran: names of the ops of those that ran since `ran` was emptied.
    """

    def __init__(self, backend="eager"):
        self.backend, self.graphs, self.ran = backend, [], []

    def __call__(self, module, inputs):
        self.graphs.append(module.graph)
        names = ops_of(module.graph)
        compiled = torch._dynamo.backends.registry.lookup_backend(self.backend)(module, inputs)

        def run(*args):
            self.ran += names
            return compiled(*args)

        return run

    def during(self, call):
        """What a call gives, and the ops that ran in it."""
        self.ran = []
        return call(), self.ran


def step(call, model, x, seed=7):
    """Output and gradients by name, the draws always the same."""
    model.zero_grad()
    torch.manual_seed(seed)
    out = call(x)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    out.backward(cotangent.to(out.dtype))
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return whole(out.detach()), {name: grad.clone() for name, grad in grads.items()}


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def exact(model):
    return copy.deepcopy(model).double()


def level(found, low, ref):
    """Of `step`: what is found is as near to the one in fp64 as what the unpatched model gives."""
    not_worse(found[0], ref[0], low[0], "output")
    gradients_not_worse(found[1], ref[1], low[1], RMS_RATIO[found[0].dtype])


def the_same(found, expected, most=1e-11):
    """Of `step` in fp64."""
    assert relative(found[0], expected[0]) < most
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        # the gradient of a bias of keys is exactly 0, or rounding
        assert (found[1][name] - grad).norm() < most * max(grad.norm(), 1e-3 * found[0].norm()), name
