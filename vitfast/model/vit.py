"""The Vision Transformer: one class, three ways in, timm's surface around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfast import reference
from vitfast.choose.exportable import exporting, refuse_proxy
from vitfast.config import ViTConfig
from vitfast.model import vit_pytorch_surface
from vitfast.model.attention_pool import AttentionPool
from vitfast.model.block import Block, given
from vitfast.model.initialise import init_as_timm
from vitfast.model.layers import LayerScale, OnOps, build_norm, few_tokens, norm_report, reasons_of, run_norm, too_small
from vitfast.model.patch_embed import PatchEmbed
from vitfast.model.plain import any_global_hook, note_methods, plain, replaced, why_not_plain
from vitfast.model.timm_surface import TimmSurface, pool_of, say_mask_is_stock
from vitfast.weights import vit_pytorch
from vitfast.weights.resample import resample_pos_embed
from vitfast.weights.state_dict import check_state_dict, copies, load_or_put_back, translates


class ViT(TimmSurface, OnOps, nn.Module):
    """Vision Transformer on vitfast's ops.

    The constructor takes vit-pytorch's keywords and builds vit-pytorch's architecture, so that changing the import
    is the whole migration. timm's models come from `vitfast.create_model`, anything else from `ViT.from_config`.

    Args:
        image_size, patch_size: pixels, int or (height, width); the patch must divide the image.
        num_classes: 0 returns the tokens [B, N, D] in place of logits.
        dim, depth, heads, mlp_dim: width, blocks, heads, hidden width of the MLP.
        pool: 'cls' or 'mean'.
        channels: image channels.
        dim_head: width of a head.
        dropout: of attention weights, projections and MLP.
        emb_dropout: after the position embedding.

    Raises:
        ValueError, TypeError: a field breaks its rule (see `ViTConfig`).
    """

    BLOCKS: ClassVar[tuple[type[nn.Module], ...]] = (Block,)  # whose halves `intermediates` can call
    CALLS_VIEWS: ClassVar = True  # vit-pytorch's `transformer` and the like, where they have hooks

    def __init__(
        self, *, image_size: int | tuple[int, int], patch_size: int | tuple[int, int], num_classes: int, dim: int,
        depth: int, heads: int, mlp_dim: int, pool: str = "cls", channels: int = 3, dim_head: int = 64,
        dropout: float = 0.0, emb_dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"ViT: pool must be 'cls' or 'mean', got {pool!r}")
        out_proj = not (heads == 1 and dim_head == dim)
        fixed = ViTConfig(
            image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            head_dim=dim_head, mlp_dim=mlp_dim, channels=channels, norm_eps=1e-5, qkv_bias=False,
            out_proj=out_proj, class_token=pool == "cls", mlp_dropout=dropout,
            pool="none" if num_classes == 0 else {"cls": "token", "mean": "mean"}[pool], norm_after_pool=False,
            input_norm=True, emb_dropout=emb_dropout, attn_dropout=dropout, proj_dropout=dropout if out_proj else 0.0,
        )  # fmt: skip
        # vit-pytorch takes any size up to image_size, as long as the patch divides it
        self._build(fixed.replace(dynamic_image_size=True))

    @classmethod
    def from_config(cls, config: ViTConfig) -> ViT:
        """Build the model that `config` describes, freshly initialised."""
        if not isinstance(config, ViTConfig):
            raise TypeError(f"ViT.from_config: config must be a ViTConfig, got {type(config).__name__}")
        if cls.__init__ is not ViT.__init__:
            raise TypeError(
                f"{cls.__name__}.from_config: this class has an __init__ of its own, which would not run; "
                "give it a ViT as an attribute, or override methods only"
            )
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model._build(config)
        return model

    def _build(self, config: ViTConfig) -> None:
        self.config = config
        self.distilled_training = False
        self.grad_checkpointing = False
        self.num_prefix_tokens = config.num_prefix_tokens
        self.num_reg_tokens = config.register_tokens
        self.has_class_token = config.class_token
        self.no_embed_class = config.pos_embed == "patches"
        self.feature_info = [
            dict(module=f"blocks.{i}", num_chs=config.dim, reduction=max(config.patch_size))  # type: ignore[arg-type]  # a pair since ViTConfig.__post_init__
            for i in range(config.depth)
        ]
        self.patch_embed = PatchEmbed(config)
        self._build_tokens(config)
        self.pos_drop = nn.Dropout(config.emb_dropout)
        final_norm = build_norm(config, config.dim) if config.final_norm else nn.Identity()
        if config.input_norm:
            # vit-pytorch's order of parameters, so that its optimizer state fits
            self.norm = nn.Identity() if config.norm_after_pool else final_norm
        else:
            # for timm's PatchDropout
            self.patch_drop = nn.Identity()
            self.norm_pre: nn.Module = build_norm(config, config.dim) if config.pre_norm else nn.Identity()
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
        if not config.input_norm:
            self.norm = nn.Identity() if config.norm_after_pool else final_norm
        # None where timm has None
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = final_norm if config.norm_after_pool else nn.Identity()
        if config.input_norm:
            self.to_latent = nn.Identity()
            # wrappers of vit-pytorch read these two; `pool` is a string there and a method in timm
            mean = config.pool == "mean" or not config.class_token
            self.__dict__["pool"], self.patch_size = "mean" if mean else "cls", config.patch_size
        self.head_drop = nn.Dropout(config.head_dropout)
        self._build_heads()
        if not config.input_norm:
            init_as_timm(self)

    def _build_tokens(self, config: ViTConfig) -> None:
        D, positions = config.dim, {"all": config.num_prefix_tokens, "patches": 0, "none": None}[config.pos_embed]
        if config.input_norm:
            self.cls_token: Tensor | None = nn.Parameter(torch.randn(int(config.class_token), D))
            self.pos_embed: Tensor | None = nn.Parameter(torch.randn(config.num_patches + config.num_prefix_tokens, D))
            return
        token = lambda n: nn.Parameter(torch.empty(1, n, D)) if n else None  # noqa: E731
        self.cls_token = token(int(config.class_token))
        self.reg_token = token(config.register_tokens)
        self.pos_embed = None if positions is None else token(config.num_patches + positions)
        if config.distillation_token:
            self.dist_token = token(1)

    def _build_heads(self) -> None:
        like = next(self.blocks.parameters(), next(self.parameters(), None))
        factory: dict[str, Any] = {} if like is None else dict(device=like.device, dtype=like.dtype)
        build = lambda: (  # noqa: E731
            nn.Linear(self.config.dim, self.num_classes, **factory) if self.num_classes else nn.Identity()
        )
        self.head = build().train(self.training)
        if self.config.distillation_token:
            self.head_dist = build().train(self.training)

    @torch.no_grad()
    def init_weights(self, mode: str = "") -> None:
        """Initialise every parameter anew, for instance after `to_empty` of a model built on 'meta'.

        timm's default initialisation (truncated normal of 0.02, tokens near zero, gates of SwiGLU open), or
        vit-pytorch's for its architecture.

        Raises:
            NotImplementedError: another of timm's modes.
        """
        if mode:
            raise NotImplementedError(f"init_weights: mode must be '' (timm's default), got {mode!r}")
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, nn.LayerNorm, nn.RMSNorm)):
                module.reset_parameters()
            elif isinstance(module, LayerScale):
                module.gamma.fill_(module.init_values)
        if self.config.input_norm:
            for token in (self.cls_token, self.pos_embed):
                nn.init.normal_(token)  # type: ignore[arg-type]  # vit-pytorch has both
        else:
            init_as_timm(self)

    def __getattr__(self, name: str) -> Any:
        if name in vit_pytorch_surface.ATTRIBUTES:
            return vit_pytorch_surface.attribute(self, name)
        # not by `super()`: a forward asks twenty times
        return nn.Module.__getattr__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vit_pytorch_surface.ATTRIBUTES:
            name, value = vit_pytorch_surface.assigned(self, name, value)
        super().__setattr__(name, value)
        if name == "head" and isinstance(value, nn.Linear) and value.out_features != self.num_classes:
            # a file of the weights says for how many classes they are
            self.config = self.config.replace(num_classes=value.out_features)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]; features without a classifier, tokens without pooling.

        Args:
            x: normalised pixels in the model's dtype (any float under autocast).
            attn_mask: as in `ops.attention`; attention then runs as `F.scaled_dot_product_attention`.
            is_causal: a token attends to itself and those before it; runs as a mask does.

        Raises:
            TypeError, ValueError: what is wrong with the images, expected and got; a mask and is_causal.
        """
        refuse_proxy(x)
        how = {} if attn_mask is None and not is_causal else given(attn_mask, is_causal)
        keep = None if how or few_tokens(x, self.config) else self._tokens_that_count()
        if keep is None:
            return self.forward_head(self.forward_features(x, **how))
        return self.forward_head(self._features(x, keep=keep))

    def _tokens_that_count(self, dropout_counts: bool = True) -> int | None:
        """How many leading tokens the last block has to compute, None for all.

        With pooling by token only the class token (and the distillation token) is read after the last block: the
        rest of its queries, projections and MLP rows can be left out exactly. Not where somebody could see them.
        """
        if self.config.pool != "token" or not self.config.depth:
            return None
        if self.attn_pool is not None or any(replaced(self, name) for name in PUBLIC_STAGES):
            return None
        watched = vit_pytorch_surface.watched(self, "transformer")
        if watched or not plain(self.blocks, nn.Sequential) or not len(self.blocks):
            return None
        last = self.blocks[-1]
        if not (type(last) is Block and last.untouched(dropout_counts) and plain(self.norm, *NORMS_OR_NONE)):
            return None
        return 1 + int(self.config.distillation_token)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images -> all tokens [B, N, D] after the final norm."""
        return self._features(x, **given(attn_mask, is_causal))

    def _features(self, x: Tensor, keep: int | None = None, **how: Any) -> Tensor:
        refuse_proxy(x)
        x, transformer = self.embed(x), vit_pytorch_surface.watched(self, "transformer")
        if how:
            say_mask_is_stock()
        return self._transform(x, keep, **how) if transformer is None else transformer(x, **how)

    def _transform(self, x: Tensor, keep: int | None = None, **how: Any) -> Tensor:
        """Tokens [B, N, D] through all blocks and the final norm; the last block may compute only the first `keep`.

        how: of attention, as `given` has it.
        """
        by_block = how or keep is not None or self.grad_checkpointing
        if not by_block or (not how and not plain(self.blocks, nn.Sequential)):
            # as one segment where checkpointing is on: the container has to run, and it runs all blocks
            return run_norm(self.norm, self._run_block(self.blocks, x), self.ops)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = self._run_block(block, x, keep if i == last else None, **how)
        return run_norm(self.norm, x, self.ops)

    def _run_block(self, block: nn.Module, x: Tensor, keep: int | None = None, **how: Any) -> Tensor:
        how |= {} if keep is None else {"keep": keep}
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **how)
        return block(x, **how)

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens [B, P + N, D] that enter the first block."""
        refuse_proxy(images)
        if not too_small(self.patch_embed._modules.get("proj"), images) and self._embeds_by_op():
            self.patch_embed.check(images)
            return self._before_blocks(self._drop(self._embed_by_op(images)))
        x = (vit_pytorch_surface.watched(self, "to_patch_embedding") or self.patch_embed)(images)
        if x.dim() == 3 and self._has_grid():
            # vit-pytorch's stem, or one that somebody put there
            x = x.unflatten(1, self._grid_of(images))
        return self._before_blocks(self._pos_embed(x))

    def _has_grid(self) -> bool:
        """Whether positions depend on the rows and columns of patches."""
        return self.config.dynamic_image_size or self.config.input_norm

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        stem, size = self.patch_embed, (images.shape[2], images.shape[3])
        # timm's stems have the other
        return stem.grid_of(size) if hasattr(stem, "grid_of") else stem.dynamic_feat_size(size)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Patches [B, N, D], of a model that takes dynamic sizes [B, rows, columns, D] -> tokens [B, P + N, D].

        timm's name for positions, prefix tokens and `pos_drop`.
        """
        if x.dim() != 3 + self._has_grid():
            expected = "[B, rows, columns, D]" if self._has_grid() else "[B, N, D]"
            raise ValueError(f"ViT: patches must be {expected}, got {list(x.shape)}")
        grid = None
        if self._has_grid():
            grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        return self._drop(reference.with_prefix(x, self._positions(grid), self._prefix()))

    def _drop(self, x: Tensor) -> Tensor:
        # timm has no dropout where there are no positions
        return x if self.pos_embed is None else self.pos_drop(x)

    def _before_blocks(self, x: Tensor) -> Tensor:
        if self.config.input_norm:
            return x
        return run_norm(self.norm_pre, self.patch_drop(x), self.ops)

    def _check_images(self, images: Tensor) -> None:
        if isinstance(self.patch_embed, PatchEmbed):
            self.patch_embed.check(images)

    def _embeds_by_op(self) -> bool:
        """Whether patches, positions and prefix tokens are one op: nothing of them was replaced or is watched."""
        patch_embed = self.patch_embed
        return (
            not self.config.input_norm
            and plain(patch_embed, PatchEmbed)
            and patch_embed.cuts_patches()
            and plain(patch_embed.norm, nn.Identity)
            and not replaced(self, "_pos_embed")
            and not any_global_hook()
        )

    def _embed_by_op(self, images: Tensor, mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
        proj, positions = self.patch_embed.proj, self._positions(self._grid_of(images) if self._has_grid() else None)
        return self.ops.patch_embed(
            images, proj.weight, proj.bias, pos_embed=positions, prefix=self._prefix(), mean=mean, std=std,
            pad=self.patch_embed.dynamic_img_pad,
        )  # fmt: skip

    def _prefix(self) -> Tensor | None:
        """Class, distillation and register tokens, [P, D]."""
        if self.config.input_norm:
            return self.cls_token
        tokens = self.cls_token, self.dist_token if self.config.distillation_token else None, self.reg_token
        found = [t.squeeze(0) for t in tokens if t is not None]
        return torch.cat(found) if len(found) > 1 else (found[0] if found else None)

    def _positions(self, grid: Any) -> Tensor | None:
        """Positions [P + N, D] or [N, D] for patches in this many rows and columns; None where sizes are fixed."""
        if self.pos_embed is None:
            return None
        if self.config.input_norm:
            tokens = self.num_prefix_tokens + grid[0] * grid[1]
            if tokens > self.pos_embed.shape[0]:
                raise ValueError(
                    f"ViT: images of {grid[0]}x{grid[1]} patches make {tokens} tokens, but there are positions for "
                    f"{self.pos_embed.shape[0]} (image_size={self.config.image_size})"
                )
            return self.pos_embed[:tokens]
        pos_embed = self.pos_embed
        if not self.config.dynamic_image_size:
            return pos_embed.squeeze(0)
        # an exported program serves all sizes, so it must not be told that this one needs no resampling
        if exporting() or grid != self.patch_embed.grid_size:
            pos_embed = resample_pos_embed(pos_embed, grid, self.patch_embed.grid_size, self._positioned_prefix())
        return pos_embed.squeeze(0)

    def _positioned_prefix(self) -> int:
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D], or the tokens where nothing is pooled. pool_type: timm's name, for once."""
        return self._pool(x, self.config.pool if pool_type is None else pool_of("pool_type", pool_type))

    def _pool(self, x: Tensor, pool: str) -> Tensor:
        if self.attn_pool is not None:
            # whatever is asked for, as in timm
            return self.attn_pool(x if self.config.pool_prefix else x[:, self.num_prefix_tokens :])
        if pool == "none":
            return x
        if pool == "token":
            return x[:, 0]
        if not self.config.pool_prefix:
            x = x[:, self.num_prefix_tokens :]
        if pool == "map":
            raise ValueError("ViT: pooling 'map' must have an attn_pool, got none")
        return x.mean(dim=1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens after the final norm -> logits, or with `pre_logits` the features before the classifier."""
        if self.config.distillation_token:
            return self._forward_two_heads(x, pre_logits)
        if self.config.input_norm:
            x = self.to_latent(run_norm(self.fc_norm, self._pool(x, self.config.pool), self.ops))
        else:
            x = run_norm(self.fc_norm, self.pool(x), self.ops)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _forward_two_heads(self, x: Tensor, pre_logits: bool) -> Any:
        x, distilled = self.head_drop(x[:, 0]), self.head_drop(x[:, 1])
        if pre_logits:
            return (x + distilled) / 2
        x, distilled = self.head(x), self.head_dist(distilled)
        return (x, distilled) if self.distilled_training and self.training else (x + distilled) / 2

    def intermediates(self, x: Tensor) -> dict[str, Tensor]:
        """All named intermediates of one forward, computed the way `forward_features` computes them.

        Returns:
            'patch_tokens': tokens that enter the first block; 'blocks.{i}.attn' and 'blocks.{i}.mlp': tokens after
            that branch, residual included; 'tokens': after the final norm; 'pooled': what the classifier reads;
            'logits'.

        Raises:
            NotImplementedError: a block was replaced or has hooks, so that its two halves are not all that it does.
        """
        for i, block in enumerate(self.blocks):
            why = why_not_plain(block, *self.BLOCKS)
            if why is not None:
                raise NotImplementedError(f"intermediates: blocks.{i} {why}; use forward_intermediates")
        taps = {"patch_tokens": self.embed(x)}
        x = taps["patch_tokens"]
        for i, block in enumerate(self.blocks):
            x = taps[f"blocks.{i}.attn"] = block.attention_branch(x)
            x = taps[f"blocks.{i}.mlp"] = block.mlp_branch(x)
        x = taps["tokens"] = run_norm(self.norm, x, self.ops)
        taps["pooled"] = self.forward_head(x, pre_logits=True)
        # two heads read two features, of which 'pooled' is the mean
        taps["logits"] = self.forward_head(x) if self.config.distillation_token else self.head(taps["pooled"])
        return taps

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """(part, op, reasons why the op does not run) for every part, as the model is now; see `vitfast.explain`."""
        op = "linear" if self.config.input_norm else "patch_embed"
        rows = [("patch_embed", op, reasons_of([("patch_embed", self.patch_embed, PatchEmbed)]))]
        if type(self.patch_embed) is PatchEmbed:
            rows = [("patch_embed", op, self.patch_embed.why_not_fused())]
            if not self.config.input_norm:
                rows += norm_report([("patch_embed.norm", self.patch_embed.norm)])
        if not self.config.input_norm:
            rows += norm_report([("norm_pre", self.norm_pre)])
        for i, block in enumerate(self.blocks):
            # of its own class: a class derived from a block may do anything
            if "fusion_report" not in vars(type(block)):
                rows.append((f"blocks.{i}", "", [f"is {type(block).__name__}, not Block"]))
                continue
            rows += [(f"blocks.{i}: {part}", op, reasons) for part, op, reasons in block.fusion_report()]
        rows += norm_report([("norm", self.norm)])
        if type(self.attn_pool) is AttentionPool:
            rows += self.attn_pool.fusion_report()
        elif self.attn_pool is not None:
            rows.append(("attn_pool", "", reasons_of([("attn_pool", self.attn_pool, AttentionPool)])))
        return rows + norm_report([("fc_norm", self.fc_norm)])

    def __prepare_scriptable__(self) -> None:
        """What torch.jit.script asks each module for."""
        raise NotImplementedError(
            "torch.jit.script cannot compile a vitfast model, whose code is no TorchScript; "
            "torch.jit.trace(model, images) works, and torch.export.export"
        )

    def state_dict(self, *args: Any, layout: str = "timm", **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """The weights under timm's names, or under vit-pytorch's with `layout='vit_pytorch'`.

        Raises:
            ValueError: unknown layout, or a model that vit-pytorch's layout cannot express.
        """
        state = super().state_dict(*args, **kwargs)
        if layout == "timm":
            return state
        if args or kwargs.get("prefix") or kwargs.get("destination") is not None:
            raise ValueError(f"state_dict: layout={layout!r} takes no destination and no prefix")
        if layout != "vit_pytorch":
            raise ValueError(f"state_dict: layout must be 'timm' or 'vit_pytorch', got {layout!r}")
        return vit_pytorch.from_vitfast(state, self.config)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under timm's names or vit-pytorch's. Nothing is loaded when anything does not fit.

        What fits is known after load hooks, and modules that translate weights of older releases, have seen them.

        Raises:
            RuntimeError: one error that lists every missing, unexpected and wrongly shaped key, and says so where the
                names are those of another library or have a prefix.
            ValueError: vit-pytorch weights for a model of another architecture.
            TypeError: no mapping.
        """
        load = super().load_state_dict
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"load_state_dict: state_dict must map names to tensors, got {type(state_dict).__name__}")
        if translates(self, state_dict, ViT._load_from_state_dict):
            return load_or_put_back(self, state_dict, strict, lambda: load(state_dict, strict=False, assign=assign))
        if vit_pytorch.is_layout(state_dict, self.config):
            state_dict = vit_pytorch.to_vitfast(state_dict, self.config)
        check_state_dict(self, state_dict, strict)
        if assign or not copies(self, state_dict):
            return load_or_put_back(self, state_dict, strict, lambda: load(state_dict, strict=False, assign=assign))
        return load(state_dict, strict=strict)

    def _load_from_state_dict(self, *args: Any) -> None:
        # vit-pytorch weights of a ViT inside another module (MAE, DataParallel), whose load_state_dict is not ours, or
        # of one with load hooks; those see the names that were given, so this one is the last
        handle = self._register_load_state_dict_pre_hook(self._translate_names)
        try:
            super()._load_from_state_dict(*args)
        finally:
            handle.remove()

    def _translate_names(self, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        own = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        if vit_pytorch.is_layout(own, self.config):
            for key in own:
                del state_dict[prefix + key]
            state_dict.update({prefix + k: v for k, v in vit_pytorch.to_vitfast(own, self.config).items()})


NORMS_OR_NONE = (nn.LayerNorm, nn.RMSNorm, nn.Identity)
PUBLIC_STAGES = ("forward_features", "forward_head", "pool", "embed")

note_methods(TimmSurface, ViT)
