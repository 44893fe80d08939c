"""The Vision Transformer: one class, three ways in, timm's surface around it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitfast import ops, reference
from vitfast.config import ViTConfig
from vitfast.fusion import any_global_hook, plain
from vitfast.model import Attention, AttentionPool, Block, PatchEmbed, build_norm, run_norm
from vitfast.weights import vit_pytorch
from vitfast.weights.pos_embed import resample_pos_embed
from vitfast.weights.state_dict import check_state_dict

TIMM_POOLS = {"token": "token", "mean": "avg", "map": "map", "none": ""}
POOLS_BY_TIMM_NAME = {timm_name: pool for pool, timm_name in TIMM_POOLS.items()}


class ViT(nn.Module):
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

    def __init__(
        self, *, image_size, patch_size, num_classes, dim, depth, heads, mlp_dim, pool="cls", channels=3,
        dim_head=64, dropout=0.0, emb_dropout=0.0,
    ):  # fmt: skip
        super().__init__()
        if pool not in ("cls", "mean"):
            raise ValueError(f"ViT: pool must be 'cls' or 'mean', got {pool!r}")
        # vit-pytorch takes any size up to image_size, as long as the patch divides it
        fixed = ViTConfig(
            image_size=image_size, patch_size=patch_size, num_classes=num_classes, dim=dim, depth=depth, heads=heads,
            head_dim=dim_head, mlp_dim=mlp_dim, channels=channels, norm_eps=1e-5, qkv_bias=False,
            out_proj=not (heads == 1 and dim_head == dim), class_token=pool == "cls",
            pool="none" if num_classes == 0 else {"cls": "token", "mean": "mean"}[pool], norm_after_pool=False,
            input_norm=True, emb_dropout=emb_dropout, attn_dropout=dropout, proj_dropout=dropout, mlp_dropout=dropout,
        )  # fmt: skip
        self._build(fixed.replace(dynamic_image_size=True))

    @classmethod
    def from_config(cls, config: ViTConfig) -> ViT:
        """Build the model that `config` describes, freshly initialised."""
        if not isinstance(config, ViTConfig):
            raise TypeError(f"ViT.from_config: config must be a ViTConfig, got {type(config).__name__}")
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
            dict(module=f"blocks.{i}", num_chs=config.dim, reduction=max(config.patch_size))
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
            self.norm_pre = build_norm(config, config.dim) if config.pre_norm else nn.Identity()
        rates = [config.drop_path * i / max(config.depth - 1, 1) for i in range(config.depth)]
        self.blocks = nn.Sequential(*(Block(config, rate) for rate in rates))
        if not config.input_norm:
            self.norm = nn.Identity() if config.norm_after_pool else final_norm
        if config.pool == "map":
            self.attn_pool = AttentionPool(config)
        self.fc_norm = final_norm if config.norm_after_pool else nn.Identity()
        if config.input_norm:
            self.to_latent = nn.Identity()
            # wrappers of vit-pytorch read these two; `pool` is a string there and a method in timm
            self.pool, self.patch_size = "cls" if config.class_token else "mean", config.patch_size
        self.head_drop = nn.Dropout(config.head_dropout)
        self._build_heads()
        if not config.input_norm:
            self.init_weights()

    def _build_tokens(self, config: ViTConfig) -> None:
        D, positions = config.dim, {"all": config.num_prefix_tokens, "patches": 0, "none": None}[config.pos_embed]
        if config.input_norm:
            self.cls_token = nn.Parameter(torch.randn(int(config.class_token), D))
            self.pos_embed = nn.Parameter(torch.randn(config.num_patches + config.num_prefix_tokens, D))
            return
        token = lambda n: nn.Parameter(torch.empty(1, n, D)) if n else None  # noqa: E731
        self.cls_token = token(int(config.class_token))
        self.reg_token = token(config.register_tokens)
        self.pos_embed = None if positions is None else token(config.num_patches + positions)
        if config.distillation_token:
            self.dist_token = token(1)

    def _build_heads(self) -> None:
        like = next(self.blocks.parameters(), None)
        factory = {} if like is None else dict(device=like.device, dtype=like.dtype)
        build = lambda: (  # noqa: E731
            nn.Linear(self.config.dim, self.num_classes, **factory) if self.num_classes else nn.Identity()
        )
        self.head = build().train(self.training)
        if self.config.distillation_token:
            self.head_dist = build().train(self.training)

    @torch.no_grad()
    def init_weights(self) -> None:
        """timm's default initialisation: truncated normal of 0.02, tokens near zero, gates of SwiGLU open."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for block in self.blocks:
            if block.mlp.kind == "swiglu":
                open_gate(block.mlp.fc1_g.weight, block.mlp.fc1_g.bias)
            elif block.mlp.kind == "swiglu_packed":
                # timm opens the second half, also where the first is the gate
                half, bias = block.mlp.fc1.out_features // 2, block.mlp.fc1.bias
                open_gate(block.mlp.fc1.weight[half:], None if bias is None else bias[half:])
        for name, std in (("pos_embed", 0.02), ("cls_token", None), ("reg_token", None), ("dist_token", 0.02)):
            token = getattr(self, name, None)
            if token is not None:
                nn.init.normal_(token, std=1e-6) if std is None else nn.init.trunc_normal_(token, std=std)
        if self.config.pool == "map":
            nn.init.trunc_normal_(self.attn_pool.latent, std=self.config.dim**-0.5)

    num_classes = property(lambda self: self.config.num_classes)
    embed_dim = num_features = head_hidden_size = property(lambda self: self.config.dim)
    in_chans = property(lambda self: self.config.channels)
    global_pool = property(lambda self: TIMM_POOLS[self.config.pool])
    dynamic_img_size = property(lambda self: self.config.dynamic_image_size)
    pool_include_prefix = property(lambda self: self.config.pool_prefix)

    def __getattr__(self, name: str) -> Any:
        if name in vit_pytorch.ATTRIBUTES:
            return vit_pytorch.attribute(self, name)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in vit_pytorch.ATTRIBUTES:
            name = vit_pytorch.settable(name)
        super().__setattr__(name, value)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Images [B, C, H, W] -> logits [B, num_classes]; features without a classifier, tokens without pooling.

        Args:
            x: normalised pixels in the model's dtype (any float under autocast).
            attn_mask: as in `ops.attention`; attention then runs as `F.scaled_dot_product_attention`.

        Raises:
            TypeError, ValueError: what is wrong with the images, expected and got.
        """
        keep = self._tokens_that_count() if attn_mask is None else None
        if keep is None:
            return self.forward_head(self.forward_features(x, attn_mask))
        return self.forward_head(self._features(x, None, keep))

    def _tokens_that_count(self) -> int | None:
        """How many leading tokens the last block has to compute, None for all.

        With pooling by token only the class token (and the distillation token) is read after the last block: the
        rest of its queries, projections and MLP rows can be left out exactly. Not where somebody could see them.
        """
        if self.config.pool != "token" or not self.config.depth or any_global_hook():
            return None
        cls = type(self)
        if any(getattr(cls, name) is not getattr(ViT, name) for name in PUBLIC_STAGES):
            return None
        if any(callable(self.__dict__.get(name)) for name in PUBLIC_STAGES):
            return None
        last = self.blocks[-1]
        untouched = plain(self.blocks, nn.Sequential) and plain(last, Block) and plain(self.norm, *NORMS_OR_NONE)
        if not untouched or not plain(last.attn, Attention):
            return None
        if any(module._forward_hooks or module._forward_pre_hooks for module in last.modules()):
            return None
        return 1 + int(self.config.distillation_token)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Images -> all tokens [B, N, D] after the final norm."""
        return self._features(x, attn_mask, None)

    def _features(self, x: Tensor, attn_mask: Tensor | None, keep: int | None) -> Tensor:
        if attn_mask is not None:
            _say_mask_is_stock()
        x = self.embed(x)
        if not plain(self.blocks, nn.Sequential) and attn_mask is None and not self.grad_checkpointing:
            return run_norm(self.norm, self.blocks(x))
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = self._run_block(block, x, attn_mask, keep if i == last else None)
        return run_norm(self.norm, x)

    def _run_block(self, block: nn.Module, x: Tensor, attn_mask: Tensor | None, keep: int | None = None) -> Tensor:
        args = (x,) if attn_mask is None and keep is None else (x, attn_mask, keep)
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *args, use_reentrant=False)
        return block(*args)

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens [B, P + N, D] that enter the first block."""
        patch_embed, prefix = self.patch_embed, self._prefix()
        fused = (
            not self.config.input_norm
            and plain(patch_embed, PatchEmbed)
            and plain(patch_embed.proj, nn.Conv2d)
            and plain(patch_embed.norm, nn.Identity)
            and not any_global_hook()
        )
        if fused:
            images = patch_embed.prepare(images)
            positions = self._positions(images)
            proj = patch_embed.proj
            x = ops.patch_embed(images, proj.weight, proj.bias, pos_embed=positions, prefix=prefix)
        else:
            x = reference.with_prefix(patch_embed(images), self._positions(images), prefix)
        x = self.pos_drop(x)
        return x if self.config.input_norm else run_norm(self.norm_pre, x)

    def _prefix(self) -> Tensor | None:
        """Class, distillation and register tokens, [P, D]."""
        if self.config.input_norm:
            return self.cls_token if self.config.class_token else None
        names = ("cls_token", "dist_token", "reg_token")
        found = [t.squeeze(0) for t in (getattr(self, name, None) for name in names) if t is not None]
        return torch.cat(found) if len(found) > 1 else (found[0] if found else None)

    def _positions(self, images: Tensor) -> Tensor | None:
        """Positions for these images, [P + N, D] or [N, D]."""
        if self.pos_embed is None:
            return None
        grid = self.patch_embed.dynamic_feat_size(tuple(images.shape[2:]))
        if self.config.input_norm:
            tokens = self.num_prefix_tokens + grid[0] * grid[1]
            if tokens > self.pos_embed.shape[0]:
                raise ValueError(
                    f"ViT: images of {images.shape[2]}x{images.shape[3]} make {tokens} tokens, but there are positions "
                    f"for {self.pos_embed.shape[0]} (image_size={self.config.image_size})"
                )
            return self.pos_embed[:tokens]
        pos_embed = self.pos_embed
        if self.config.dynamic_image_size and grid != self.patch_embed.grid_size:
            pos_embed = resample_pos_embed(pos_embed, grid, self.patch_embed.grid_size, self._positioned_prefix())
        return pos_embed.squeeze(0)

    def _positioned_prefix(self) -> int:
        return 0 if self.no_embed_class else self.num_prefix_tokens

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Tokens [B, N, D] -> [B, D], or the tokens where nothing is pooled. pool_type: timm's name, for once."""
        return self._pool(x, self.config.pool if pool_type is None else _pool_of("pool_type", pool_type))

    def _pool(self, x: Tensor, pool: str) -> Tensor:
        if pool == "none":
            return x
        if pool == "token":
            return x[:, 0]
        if not self.config.pool_prefix:
            x = x[:, self.num_prefix_tokens :]
        return x.mean(dim=1) if pool == "mean" else self.attn_pool(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens after the final norm -> logits, or with `pre_logits` the features before the classifier."""
        if self.config.distillation_token:
            return self._forward_two_heads(x, pre_logits)
        x = run_norm(self.fc_norm, self._pool(x, self.config.pool))
        if self.config.input_norm:
            x = self.to_latent(x)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def _forward_two_heads(self, x: Tensor, pre_logits: bool) -> Tensor:
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
        """
        taps = {"patch_tokens": self.embed(x)}
        x = taps["patch_tokens"]
        for i, block in enumerate(self.blocks):
            x = taps[f"blocks.{i}.attn"] = block.attention_branch(x)
            x = taps[f"blocks.{i}.mlp"] = block.mlp_branch(x)
        x = taps["tokens"] = run_norm(self.norm, x)
        taps["pooled"] = self.forward_head(x, pre_logits=True)
        taps["logits"] = self.forward_head(x)
        return taps

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

        Returns:
            (final tokens, list), the list, or the dict.

        Raises:
            ValueError: output_fmt or an index does not exist.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"forward_intermediates: output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        if attn_mask is not None:
            _say_mask_is_stock()
        wanted = self._block_indices(indices)
        B, grid = x.shape[0], self.patch_embed.dynamic_feat_size(tuple(x.shape[2:]))
        x, found = self.embed(x), []
        stop = max(wanted, default=-1) + 1 if stop_early else len(self.blocks)
        for i, block in enumerate(self.blocks[:stop]):
            x = self._run_block(block, x, attn_mask)
            if i in wanted:
                found.append(run_norm(self.norm, x) if norm else x)
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
                result["image_features"] = run_norm(self.norm, x)
            return result
        if with_prefix:
            maps = list(zip(maps, prefix, strict=True))
        return maps if intermediates_only else (run_norm(self.norm, x), maps)

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
        pool = self.config.pool if global_pool is None else _pool_of("global_pool", global_pool)
        if pool == "map" and self.config.pool != "map":
            raise ValueError("reset_classifier: global_pool='map' needs a model built with it, got one without")
        config = self.config.replace(num_classes=num_classes, pool=pool, norm_after_pool=self.config.norm_after_pool)
        if self.config.pool == "map" and pool != "map":
            del self.attn_pool
        self.config = config
        self._build_heads()
        if zero_init and num_classes:
            for head in (self.head, getattr(self, "head_dist", None)):
                if head is not None:
                    nn.init.zeros_(head.weight)
                    nn.init.zeros_(head.bias)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size; positions are resampled to the new grid.

        Raises:
            NotImplementedError: another patch_size (the projection would have to be resampled).
        """
        if patch_size is not None and self.config.replace(patch_size=patch_size).patch_size != self.config.patch_size:
            raise NotImplementedError(f"set_input_size: patch_size stays {self.config.patch_size}, got {patch_size}")
        if img_size is None:
            return
        if self.config.input_norm:
            raise NotImplementedError("set_input_size: vit-pytorch's positions are not on a grid that can be resampled")
        config = self.config.replace(image_size=img_size)
        if self.pos_embed is not None:
            pos_embed = resample_pos_embed(
                self.pos_embed.detach(), config.grid_size, self.config.grid_size, self._positioned_prefix()
            )
            self.pos_embed = nn.Parameter(pos_embed.clone(), requires_grad=self.pos_embed.requires_grad)
        self.config = config
        self.patch_embed.img_size, self.patch_embed.grid_size = config.image_size, config.grid_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward in place of keeping its activations."""
        self.grad_checkpointing = enable

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
        stem = r"^(cls_token|reg_token|dist_token|pos_embed|patch_embed|norm_pre)"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm\.", (99999,))]}

    def fusion_report(self) -> list[tuple[str, str, list[str]]]:
        """(part, op, reasons why the op does not run) for every part, as the model is now; see `vitfast.explain`."""
        op = "linear" if self.config.input_norm else "patch_embed"
        rows = [("patch_embed", op, self.patch_embed.why_not_fused())]
        for i, block in enumerate(self.blocks):
            if type(block) is not Block:
                rows.append((f"blocks.{i}", "", [f"is {type(block).__name__}, not Block"]))
                continue
            rows += [(f"blocks.{i}: {part}", op, reasons) for part, op, reasons in block.fusion_report()]
        return rows

    def state_dict(self, *args, layout: str = "timm", **kwargs) -> dict[str, Tensor]:
        """The weights under timm's names, or under vit-pytorch's with `layout='vit_pytorch'`.

        Raises:
            ValueError: unknown layout, or a model that vit-pytorch's layout cannot express.
        """
        state = super().state_dict(*args, **kwargs)
        if layout == "timm":
            return state
        if layout != "vit_pytorch":
            raise ValueError(f"state_dict: layout must be 'timm' or 'vit_pytorch', got {layout!r}")
        return vit_pytorch.from_vitfast(state, self.config)

    def load_state_dict(self, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Load weights under timm's names or vit-pytorch's. Nothing is loaded when anything does not fit.

        Raises:
            RuntimeError: one error that lists every missing, unexpected and wrongly shaped key.
            ValueError: vit-pytorch weights for a model of another architecture.
        """
        if vit_pytorch.is_layout(state_dict):
            state_dict = vit_pytorch.to_vitfast(state_dict, self.config)
        check_state_dict(self, state_dict, strict)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


PUBLIC_STAGES = ("forward_features", "forward_head", "pool", "embed")
NORMS_OR_NONE = (nn.LayerNorm, nn.RMSNorm, nn.Identity)


def open_gate(weight: Tensor, bias: Tensor | None) -> None:
    """Start a SwiGLU gate at a constant: weights near zero, bias one."""
    nn.init.normal_(weight, std=1e-6)
    if bias is not None:
        nn.init.ones_(bias)


def _pool_of(argument: str, timm_name: str) -> str:
    if timm_name not in POOLS_BY_TIMM_NAME:
        raise ValueError(f"{argument} must be one of {list(POOLS_BY_TIMM_NAME)}, got {timm_name!r}")
    return POOLS_BY_TIMM_NAME[timm_name]


def _say_mask_is_stock() -> None:
    if not torch.compiler.is_compiling():
        warnings.warn(
            "attn_mask: attention runs as torch's scaled_dot_product_attention, not as vitfast's op", stacklevel=3
        )
