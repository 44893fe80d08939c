"""The small parts of a ViT and how they run: norms and linear layers as ops where nobody changed them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import ops, reference
from vitfast.config import ViTConfig
from vitfast.model.plain import any_global_hook, plain, stands_for, why_not_plain
from vitfast.ops import stock
from vitfast.ops._check import autocast_dtype
from vitfast.ops._on_cpu import host_bound

NORMS = (nn.LayerNorm, nn.RMSNorm)


class OnOps:
    """A module that computes by ops, or where its `exportable` is True by the stock operators that they stand for."""

    @property
    def exportable(self) -> bool:
        """Whether this module, and those inside that were there when it was set, run stock operators only."""
        return "_exportable" in self.__dict__

    @exportable.setter
    def exportable(self, value: bool) -> None:
        for module in self.modules():
            if isinstance(module, OnOps):
                held = vars(module)
                held.update(_exportable=True) if value else held.pop("_exportable", None)

    # no annotation: so an editor finds the op behind `self.ops.linear`
    @property
    def ops(self) -> ModuleType:
        return stock if "_exportable" in self.__dict__ else ops


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), the GELU of OpenAI's CLIP."""

    def forward(self, x: Tensor) -> Tensor:
        return reference.activation(x, "quick_gelu")


ACTIVATIONS = (nn.GELU, QuickGELU, nn.SiLU)


def activation_name(module: nn.Module) -> str:
    """What `ops` call the activation that `module` computes."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return "quick_gelu" if type(module) is QuickGELU else "silu"


def build_activation(name: str) -> nn.Module:
    if name in ("gelu", "gelu_tanh"):
        return nn.GELU("none" if name == "gelu" else "tanh")
    return QuickGELU() if name == "quick_gelu" else nn.SiLU()


def build_norm(config: ViTConfig, dim: int) -> nn.Module:
    return (nn.LayerNorm if config.norm == "layer" else nn.RMSNorm)(dim, eps=config.norm_eps)


def parameters_of(module: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias, wherever they are kept; `nn.Module.__getattr__` takes 0.8 us, and a block asks ten times."""
    own = module._parameters
    if "weight" in own:
        # a frozen bias may be a buffer
        return own["weight"], own["bias"] if "bias" in own else getattr(module, "bias", None)
    # sharding tools that flatten parameters leave tensors in their place
    return module.weight, getattr(module, "bias", None)


def norm_kind(module: nn.Module) -> str:
    return "layer" if isinstance(module, nn.LayerNorm) else "rms"


def norm_args(module: nn.Module) -> dict:
    """The norm prologue of `ops.linear` that does what `module` does."""
    weight, bias = parameters_of(module)
    return {"norm": norm_kind(module), "norm_weight": weight, "norm_bias": bias, "norm_eps": eps_of(module, weight)}


def eps_of(module: nn.Module, weight: Tensor | None) -> float:
    """`module.eps`; `nn.RMSNorm` without one takes that of the dtype it computes in, fp32 for half precision."""
    if module.eps is not None:
        return module.eps
    return torch.finfo(torch.float64 if weight is not None and weight.dtype is torch.float64 else torch.float32).eps


def too_small(module: nn.Module | None, x: Tensor) -> bool:
    """Whether x is too small to look for ops (`host_bound`), so that `module` and those around it run as they are.

    Not where its weight has another dtype or device than x: ops take some, and say what is wrong of the others.
    """
    if not host_bound(x):
        return False
    weight = None if module is None else module._parameters.get("weight")
    return weight is None or (weight.is_cpu and weight.dtype is x.dtype)


def few_tokens(images: Tensor, config: ViTConfig) -> bool:
    """Whether all tokens of these images are too few numbers to look for ops (`host_bound`)."""
    height, width = config.patch_size  # type: ignore[misc]  # a pair since ViTConfig.__post_init__
    return host_bound(images, config.dim / (config.channels * height * width))


def run_norm(module: nn.Module, x: Tensor, using: ModuleType = ops) -> Tensor:
    """`module(x)`, as an op where the module is a plain norm. using: `OnOps.ops` of the module around it."""
    if plain(module, nn.Identity) and not any_global_hook():
        return x
    if too_small(module, x) or not plain(module, *NORMS) or any_global_hook():
        return module(x)
    weight, bias = parameters_of(module)
    return using.layer_norm(x, weight, bias, eps_of(module, weight), norm_kind(module))


def run_linear(module: nn.Module, x: Tensor, using: ModuleType = ops) -> Tensor:
    """`module(x)`, as an op where the module is a plain linear layer; using as in `run_norm`."""
    if too_small(module, x) or not plain(module, nn.Linear) or any_global_hook():
        return module(x)
    return using.linear(x, *parameters_of(module))


class LayerScale(nn.Module):
    """Learned scale per channel of a branch ("Going deeper with Image Transformers", 2021)."""

    inplace = property(lambda self: False)  # timm's attribute

    def __init__(self, dim: int, init_values: float):
        super().__init__()
        self.init_values = float(init_values)
        self.gamma = nn.Parameter(torch.full((dim,), self.init_values))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth: a branch is dropped per image, and scaled up where it stays (Huang et al., 2016)."""

    def __init__(self, drop_prob: float = 0.0):
        super().__init__()
        self.drop_prob = drop_prob
        self.scale_by_keep = True
        # from this rate on, blocks leave dropped images out of their work; None: never
        self.subset_from: float | None = None

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:.3f}"

    def row_scale(self, x: Tensor, gamma: Tensor | None = None) -> Tensor | None:
        """[B], 0 or 1 / keep probability (1 without `scale_by_keep`) for each image; None where nothing is dropped.

        In the dtype of the branch that it scales: the one of autocast, or of a LayerScale that raises it.
        """
        if not self.training or not self.drop_prob:
            return None
        keep = 1.0 - self.drop_prob
        draws = x.new_empty(x.shape[0], dtype=self._dtype(x, gamma)).bernoulli_(keep)
        return draws.div_(keep) if keep > 0 and self.scale_by_keep else draws

    @staticmethod
    def _dtype(x: Tensor, gamma: Tensor | None) -> torch.dtype:
        dtype = autocast_dtype(x) or x.dtype
        return dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)

    def leaves_out(self) -> bool:
        """Whether a block is to compute its branch for the images only that keep it."""
        on = self.training and self.subset_from is not None and self.drop_prob >= max(self.subset_from, 1e-9)
        # how many stay is not known when a graph is made
        return on and not torch.compiler.is_compiling()

    def kept(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """int64 [n], the images that keep the branch: of `row_scale`'s distribution, drawn on the CPU.

        There the number of them is known at once: asking a GPU would wait for all work before.
        """
        draws = torch.empty(x.shape[0], dtype=self._dtype(x, gamma), device="cpu").bernoulli_(1.0 - self.drop_prob)
        return draws.nonzero()[:, 0].to(x.device, non_blocking=True)

    def kept_scale(self, x: Tensor, gamma: Tensor | None = None) -> Tensor:
        """`row_scale` of images that all keep the branch."""
        # where nothing is kept there is no image to scale
        scale = 1.0 / (1.0 - self.drop_prob) if self.drop_prob < 1.0 else 0.0
        scale = scale if self.scale_by_keep else 1.0
        return x.new_full((x.shape[0],), scale, dtype=self._dtype(x, gamma))

    def forward(self, x: Tensor) -> Tensor:
        row_scale = self.row_scale(x)
        return x if row_scale is None else reference.scale_branch(x, None, row_scale)


def gamma_of(scale: nn.Module) -> Tensor | None:
    return scale.gamma if type(scale) is LayerScale else None


def dropping(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


def added(
    x: Tensor,
    hidden: Tensor,
    linear: nn.Module,
    dropouts: Sequence[nn.Module],
    gamma: Tensor | None,
    row_scale: Callable[[], Tensor | None],
    using: ModuleType = ops,
    **norm: Any,
) -> Tensor:
    """x + row_scale * gamma * dropouts(linear(norm(hidden))).

    row_scale: draws it, after the dropouts have drawn; norm: as `norm_args` says it, nothing for none.
    """
    weight, bias = parameters_of(linear)
    if any(map(dropping, dropouts)):
        branch = using.linear(hidden, weight, bias, **norm)
        for dropout in dropouts:
            branch = dropout(branch)
        return x + reference.scale_branch(branch, gamma, row_scale())
    return using.linear(hidden, weight, bias, gamma=gamma, row_scale=row_scale(), residual=x, **norm)


def norm_report(norms: list[tuple[str, nn.Module]]) -> list[tuple[str, str, list[str]]]:
    """`Block.fusion_report` of norms that stand alone; nothing for those that the config leaves out."""
    hooks = ["a global module hook is registered"] if any_global_hook() else []
    return [
        (name, "layer_norm", hooks + reasons_of([(name, module, *NORMS)]))
        for name, module in norms
        if not plain(module, nn.Identity)
    ]


def reasons_of(parts: list[tuple]) -> list[str]:
    """Why each of (name, module, *classes) is not plain, as 'name reason'."""
    found = ((name, why_not_plain(module, *kinds)) for name, module, *kinds in parts)
    return [f"{name} {why}" for name, why in found if why]


stands_for(QuickGELU, LayerScale, DropPath)
