"""What training code written for timm's VisionTransformer touches besides the forward."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vitfast.choose.exportable import refuse_proxy
from vitfast.model.block import Mlp, given
from vitfast.model.layers import DropPath, run_norm
from vitfast.ops.mlp import RECOMPUTE
from vitfast.timm_names.variants import POOLS_BY_TIMM_NAME, TIMM_POOLS
from vitfast.weights.resample import resample_pos_embed


def pool_of(argument: str, timm_name: str) -> str:
    if timm_name not in POOLS_BY_TIMM_NAME:
        raise ValueError(f"{argument} must be one of {list(POOLS_BY_TIMM_NAME)}, got {timm_name!r}")
    return POOLS_BY_TIMM_NAME[timm_name]


def say_mask_is_stock() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "attn_mask: attention runs as torch's scaled_dot_product_attention, not as vitfast's op", stacklevel=5
        )


class TimmSurface:
    """The methods and attributes of timm's VisionTransformer, for `vitfast.ViT`."""

    # for type checkers alone: torch.jit.trace would want to understand them
    if TYPE_CHECKING:
        norm: nn.Module
        fc_norm: nn.Module
        attn_pool: nn.Module | None
        pretrained_cfg: dict[str, Any]
        default_cfg: dict[str, Any]

    @property
    def num_classes(self) -> int:
        """Classes of the head; set by training code that replaces `head` itself."""
        return self.config.num_classes

    @num_classes.setter
    def num_classes(self, value: int) -> None:
        self.config = self.config.replace(num_classes=value)

    @property
    def global_pool(self) -> str:
        """timm's name of the pooling: '', 'avg', 'token' or 'map'."""
        return TIMM_POOLS[self.config.pool]

    @global_pool.setter
    def global_pool(self, value: str) -> None:
        pool = pool_of("global_pool", value)
        if pool == "map" and self.attn_pool is None:
            raise ValueError("global_pool='map' needs a model built with it, got one without")
        self.config = self.config.replace(pool=pool)

    @property
    def dynamic_img_size(self) -> bool:
        """Whether positions are resampled for images of other sizes; `patch_embed` has to take them, too."""
        return self.config.dynamic_image_size

    @dynamic_img_size.setter
    def dynamic_img_size(self, value: bool) -> None:
        self.config = self.config.replace(dynamic_image_size=value)

    @property
    def in_chans(self) -> int:
        """Channels of the images, also where the stem's convolution was exchanged."""
        proj = getattr(self.patch_embed, "proj", None)
        return getattr(proj, "in_channels", self.config.channels)

    @property
    def embed_dim(self) -> int:
        """Width D of a token."""
        return self.config.dim

    num_features = head_hidden_size = embed_dim

    @property
    def pool_include_prefix(self) -> bool:
        """Whether pooling reads prefix tokens too."""
        return self.config.pool_prefix

    @pool_include_prefix.setter
    def pool_include_prefix(self, value: bool) -> None:
        self.config = self.config.replace(pool_prefix=value)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Iterable[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Any:
        """Token maps of chosen blocks, as timm returns them.

        Args:
            indices: the last n blocks for an int, these blocks for a sequence, all for None.
            return_prefix_tokens: pair each map with its prefix tokens.
            norm: apply the final norm to each.
            stop_early: do not run blocks after the last one asked for.
            output_fmt: 'NCHW' for maps, 'NLC' for tokens.
            intermediates_only: leave the final tokens out.
            output_dict: a dict with image_features, image_intermediates and image_intermediates_prefix.
            attn_mask, is_causal: as `forward`'s.

        Returns:
            (final tokens, list), the list, or the dict.

        Raises:
            ValueError: output_fmt or an index does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        wanted = self._block_indices(indices)
        refuse_proxy(x)
        self._check_images(x)
        B, grid, how = x.shape[0], self._grid_of(x), given(attn_mask, is_causal)
        x, found = self.embed(x), []
        if how:
            say_mask_is_stock()
        stop = max(wanted, default=-1) + 1 if stop_early else len(self.blocks)
        for i, block in enumerate(self.blocks[:stop]):
            x = self._run_block(block, x, **how)
            if i in wanted:
                found.append(run_norm(self.norm, x, self.ops) if norm else x)
        prefix = [t[:, : self.num_prefix_tokens] for t in found]
        maps = [t[:, self.num_prefix_tokens :] for t in found]
        if output_fmt == "NCHW":
            maps = [t.reshape(B, *grid, -1).permute(0, 3, 1, 2).contiguous() for t in maps]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        if output_dict:
            result = {"image_intermediates": maps}
            if with_prefix:
                result["image_intermediates_prefix"] = prefix
            if not intermediates_only:
                result["image_features"] = run_norm(self.norm, x, self.ops)
            return result
        if with_prefix:
            maps = list(zip(maps, prefix, strict=True))
        return maps if intermediates_only else (run_norm(self.norm, x, self.ops), maps)

    def prune_intermediate_layers(
        self, indices: int | Iterable[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` of these blocks does not need.

        Args:
            indices: as there; blocks after the last of them are dropped.
            prune_norm: drop the final norm.
            prune_head: drop pooling and classifier.

        Returns:
            The indices, none of them negative.
        """
        wanted = self._block_indices(indices)
        self.blocks = self.blocks[: max(wanted, default=-1) + 1]
        self.config = self.config.replace(depth=len(self.blocks))
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.fc_norm = nn.Identity()
            self.reset_classifier(0, None if self.config.distillation_token else "")
        return wanted

    def _record(self, **arguments: Any) -> None:
        """Note what timm's exporters have to give to `create_model` for this model."""
        given = {name: value for name, value in arguments.items() if value is not None}
        self._model_args = getattr(self, "_model_args", {}) | given

    @property
    def _traits(self) -> dict[str, Any]:
        """What timm's data and export helpers ask a model about its images."""
        return {
            "img_size": self.config.image_size, "fixed_input_size": not self.config.dynamic_image_size,
            "first_conv": "patch_embed.proj",
        }  # fmt: skip

    def _block_indices(self, indices: int | Iterable[int] | None) -> list[int]:
        depth = len(self.blocks)
        if indices is None:
            return list(range(depth))
        if isinstance(indices, int):
            if not 0 < indices <= depth:
                raise ValueError(f"indices must be between 1 and depth={depth} for the last blocks, got {indices}")
            return list(range(depth - indices, depth))
        indices = list(indices)
        if any(not -depth <= i < depth for i in indices):
            raise ValueError(f"indices must be between {-depth} and {depth - 1}, got {indices}")
        return [i % depth for i in indices]

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Iterable[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        attn_mask: Tensor | None = None,
    ) -> list:
        """DINO's interface to `forward_intermediates`: the last n blocks, or these blocks."""
        return self.forward_intermediates(
            x, n, return_prefix_tokens, norm, output_fmt="NCHW" if reshape else "NLC", intermediates_only=True,
            attn_mask=attn_mask,
        )  # fmt: skip

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The classifier; with a distillation token both."""
        return (self.head, self.head_dist) if self.config.distillation_token else self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, zero_init: bool = False) -> None:
        """Replace the classifier, and the pooling where asked (timm's names: '', 'avg', 'token', 'map').

        Args:
            num_classes: 0 for none.
            zero_init: start with zero weights, the usual choice for fine-tuning with a high learning rate.

        Raises:
            ValueError: that pooling does not exist here.
        """
        pool = self.config.pool if global_pool is None else pool_of("global_pool", global_pool)
        if pool == "map" and self.config.pool != "map":
            raise ValueError("reset_classifier: global_pool='map' needs a model built with it, got one without")
        config = self.config.replace(num_classes=num_classes, pool=pool)
        if pool != "map":
            self.attn_pool = None
        self.config = config
        if global_pool is not None and not self.config.distillation_token:
            self._record(fc_norm=not isinstance(self.fc_norm, nn.Identity))
        self._build_heads()
        if zero_init and num_classes:
            for head in (self.head, getattr(self, "head_dist", None)):
                if head is not None:
                    nn.init.zeros_(head.weight)
                    nn.init.zeros_(head.bias)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the size of images or patches; positions are resampled to the new grid, weights to the new patch.

        Raises:
            ValueError: sizes that break a rule of ViTConfig.
            NotImplementedError: of vit-pytorch's architecture, or another patch where the stem was replaced.
        """
        sizes = {"image_size": img_size, "patch_size": patch_size}
        config = self.config.replace(**{name: size for name, size in sizes.items() if size is not None})
        if config == self.config:
            return
        if self.config.input_norm:
            raise NotImplementedError("set_input_size: vit-pytorch's positions are not on a grid that can be resampled")
        old_grid = self.patch_embed.grid_size
        self.patch_embed.set_input_size(config.image_size, config.patch_size)
        if self.pos_embed is not None:
            pos_embed = resample_pos_embed(
                self.pos_embed.detach(), config.grid_size, old_grid, self._positioned_prefix()
            )
            self.pos_embed = nn.Parameter(pos_embed.clone(), requires_grad=self.pos_embed.requires_grad)
        self.config = config
        for info in self.feature_info:
            info["reduction"] = max(config.patch_size)
        self._record(img_size=config.image_size, patch_size=patch_size)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward in place of keeping its activations."""
        self.grad_checkpointing = enable

    def set_mlp_recompute(self, mode: str) -> None:
        """What the backward of each block's MLP computes again in place of keeping it in memory.

        Args:
            mode: 'none', 'act' (the default: the activation, which costs next to nothing) or 'fc1' (the first
                projection as well), as `recompute` of `ops.mlp`. Only MLPs that run as one op follow; see
                `vitfast.explain`.

        Raises:
            ValueError: mode is none of these.
        """
        if mode not in RECOMPUTE:
            raise ValueError(f"set_mlp_recompute: mode must be one of {RECOMPUTE}, got {mode!r}")
        for module in self.modules():
            if isinstance(module, Mlp):
                module.recompute = mode

    def set_drop_path_subset(self, rate_from: float | None = 0.1) -> None:
        """Leave images whose branch stochastic depth drops out of that branch's work: the same results, sooner.

        The distribution is that of dropping afterwards, and on a CPU so are the draws. Blocks that somebody changed,
        and compiled ones, drop afterwards as before.

        Args:
            rate_from: the drop path rate of a block from which on that is done: gathering and putting back the other
                images has to be worth it. None: nowhere.

        Raises:
            ValueError: a rate that is not from 0 to 1.
        """
        if rate_from is not None and not 0.0 <= rate_from <= 1.0:
            raise ValueError(f"set_drop_path_subset: rate_from must be from 0 to 1 or None, got {rate_from}")
        for module in self.modules():
            if isinstance(module, DropPath):
                module.subset_from = rate_from

    def set_distilled_training(self, enable: bool = True) -> None:
        """In training, return both heads' logits for a distillation loss."""
        self.distilled_training = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are not decayed, besides biases and norms."""
        return {"pos_embed", "cls_token", "reg_token", "dist_token"}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns by which timm's optimizer factory assigns layer-wise learning rates."""
        # no capturing group: timm reads those as layer numbers
        stem = r"^(?:cls_token|reg_token|dist_token|pos_embed|patch_embed|norm_pre)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]}
