"""A small model of each library that `vitfast.patch` knows, for tests of what others do with a patched model."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from test_parity_timm import gradients_not_worse, not_worse, relative
from timm_pair import make_trained_like
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from vitfast.check.acceptance import RMS_RATIO

DRAWS = {"drop_path": 0.2, "dropout": 0.1}


class Family(NamedTuple):
    """build: (drop_path, dropout, attention_dropout, depth) -> a model that gives a tensor, in training mode; blocks:
    those of a model.
    """

    build: Callable[..., nn.Module]
    blocks: Callable[[nn.Module], nn.ModuleList]


def timm_model(drop_path=0.0, dropout=0.0, attention_dropout=0.0, depth=2):
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, depth=depth, embed_dim=64, num_heads=2, num_classes=10, init_values=0.1,
        drop_path_rate=drop_path, proj_drop_rate=dropout, attn_drop_rate=attention_dropout,
    )  # fmt: skip
    return make_trained_like(model, images(), massive=False)


FAMILIES = {"timm": Family(timm_model, lambda model: model.blocks)}


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
