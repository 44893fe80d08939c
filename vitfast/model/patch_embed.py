"""From images to patch tokens: what a ViT begins with.

Shapes: B images, C channels, N tokens, D channels of a token.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitfast import reference
from vitfast.choose.exportable import refuse_proxy
from vitfast.config import ViTConfig
from vitfast.model.layers import NORMS, OnOps, build_norm, norm_args, reasons_of, run_norm, too_small
from vitfast.model.plain import any_global_hook, plain, stands_for
from vitfast.weights.resample import resample_patch_embed


def check_pixels(images: Tensor, takes_uint8: bool = False) -> None:
    """Raise TypeError where `images` is not a floating point tensor, nor of uint8 where that is taken."""
    refuse_proxy(images)
    is_tensor = isinstance(images, Tensor)
    if not is_tensor or not (images.is_floating_point() or (takes_uint8 and images.dtype is torch.uint8)):
        got = images.dtype if is_tensor else type(images).__name__
        or_uint8 = " or uint8" if takes_uint8 else ""
        raise TypeError(f"ViT: images must be a floating point tensor (normalised pixels){or_uint8}, got {got}")


class PatchEmbed(OnOps, nn.Module):
    """Images [B, C, H, W] -> patch tokens [B, N, D], row-major over the grid.

    Attributes are timm's: without `flatten` the tokens are in the layout `output_fmt` ('NCHW', 'NHWC', 'NLC' or 'NCL';
    of a model that takes dynamic sizes 'NHWC': [B, rows, columns, D]), and without `strict_img_size` images of other
    sizes are taken too.

    With `input_norm` it is vit-pytorch's: pixels of a patch in (row, column, channel) order, LayerNorm, Linear,
    LayerNorm. Otherwise a convolution whose stride is its kernel, and a norm where the config has one.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        self.img_size, self.patch_size, self.grid_size = config.image_size, config.patch_size, config.grid_size
        self.num_patches = config.num_patches
        self.channels = config.channels
        self.strict_img_size, self.dynamic_img_pad = not config.dynamic_image_size, config.dynamic_pad
        # vit-pytorch's has no grid
        self.flatten = self.strict_img_size or config.input_norm
        self.output_fmt = "NCHW" if self.flatten else "NHWC"
        if config.input_norm:
            pixels = config.channels * config.patch_size[0] * config.patch_size[1]
            self.input_norm = build_norm(config, pixels)
            self.proj = nn.Linear(pixels, config.dim)
            self.norm = build_norm(config, config.dim)
        else:
            self.input_norm = None
            self.proj = nn.Conv2d(
                config.channels, config.dim, config.patch_size, stride=config.patch_size, bias=not config.pre_norm
            )
            self.norm = build_norm(config, config.dim) if config.patch_norm else nn.Identity()

    def cuts_patches(self) -> bool:
        """Whether `proj` is a convolution as this class built it: stride and kernel are the patch, nothing else."""
        proj, patch = self.proj, self.patch_size
        return (
            plain(proj, nn.Conv2d)
            and proj.kernel_size == proj.stride == patch
            and proj.padding == (0, 0)
            and proj.dilation == (1, 1)
            and proj.groups == 1
        )

    def grid_of(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of tokens that `proj` makes of an image of `size`, also where its stride was changed."""
        proj = self.proj
        if self.input_norm is not None or not isinstance(proj, nn.Conv2d) or isinstance(proj.padding, str):
            return self.dynamic_feat_size(size)
        if self.dynamic_img_pad:
            size = tuple(-(-n // patch) * patch for n, patch in zip(size, self.patch_size, strict=True))
        parts = zip(size, proj.padding, proj.dilation, proj.kernel_size, proj.stride, strict=True)
        return tuple((n + 2 * p - d * (k - 1) - 1) // stride + 1 for n, p, d, k, stride in parts)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the size of images, and of patches: the projection is then resampled (see `resample_patch_embed`).

        Raises:
            NotImplementedError: another patch_size, where `proj` is no convolution.
        """
        pair = lambda size: (size, size) if isinstance(size, int) else tuple(size)  # noqa: E731
        if patch_size is not None and pair(patch_size) != self.patch_size:
            if not isinstance(self.proj, nn.Conv2d):
                raise NotImplementedError(
                    f"set_input_size: patch_size must stay {self.patch_size}, got {patch_size}: only the weights of a "
                    f"convolution can be resampled, and proj is a {type(self.proj).__name__}"
                )
            self.patch_size = pair(patch_size)
            self._resample_proj()
        self.img_size = self.img_size if img_size is None else pair(img_size)
        self.grid_size = tuple(n // patch for n, patch in zip(self.img_size, self.patch_size, strict=True))
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def _resample_proj(self) -> None:
        old, size = self.proj, self.patch_size
        like = dict(bias=old.bias is not None, device=old.weight.device, dtype=old.weight.dtype)
        new = nn.Conv2d(old.in_channels, old.out_channels, size, stride=size, **like).train(old.training)
        with torch.no_grad():
            new.weight.copy_(resample_patch_embed(old.weight, size)).requires_grad_(old.weight.requires_grad)
            if old.bias is not None:
                new.bias.copy_(old.bias).requires_grad_(old.bias.requires_grad)
        self.proj = new

    def feat_ratio(self, as_scalar: bool = True) -> int | tuple[int, int]:
        """Pixels per token."""
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of `size`."""
        (h, w), (ph, pw) = size, self.patch_size
        return (-(-h // ph), -(-w // pw)) if self.dynamic_img_pad else (h // ph, w // pw)

    def check(self, images: Tensor, takes_uint8: bool = False) -> None:
        """Raise where these are no images for this model.

        Raises:
            TypeError: not a floating point tensor, nor uint8 where that is taken.
            ValueError: wrong rank, channel count or size.
        """
        check_pixels(images, takes_uint8)
        channels = self.proj.in_channels if isinstance(self.proj, nn.Conv2d) else self.channels
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(f"ViT: images must be [B, {channels}, H, W], got {list(images.shape)}")
        H, W = images.shape[2:]
        ph, pw = self.patch_size
        if self.strict_img_size:
            if self.img_size != (H, W):
                raise ValueError(
                    f"ViT: images must be {self.img_size[0]}x{self.img_size[1]}, got {H}x{W} "
                    "(other sizes: dynamic_image_size=True, dynamic_img_size=True in create_model, or set_input_size)"
                )
        elif not H or not W or (not self.dynamic_img_pad and (H % ph or W % pw)):
            raise ValueError(f"ViT: image height and width must be multiples of the patch {ph}x{pw}, got {H}x{W}")

    def prepare(self, images: Tensor) -> Tensor:
        """`check` the images, and pad them where the config says so."""
        self.check(images)
        (H, W), (ph, pw) = images.shape[2:], self.patch_size
        return F.pad(images, (0, -W % pw, 0, -H % ph)) if self.dynamic_img_pad and (H % ph or W % pw) else images

    def forward(self, images: Tensor) -> Tensor:
        if self.input_norm is None:
            small = too_small(self._modules.get("proj"), images)
            if not small and self.cuts_patches() and not any_global_hook():
                self.check(images)
                x = self.ops.patch_embed(images, self.proj.weight, self.proj.bias, pad=self.dynamic_img_pad)
            else:
                images = self.prepare(images)
                # the same to the bit whatever the strides, as by the op
                x = self.proj(images.contiguous() if small else images).flatten(2).transpose(1, 2)
            if not self.flatten:
                x = self._laid_out(x, images)
        elif plain(self.input_norm, nn.LayerNorm) and plain(self.proj, nn.Linear) and not any_global_hook():
            self.check(images)
            norm = self.input_norm
            # the pixels of a row are in the order of channels-last images
            weight = self.proj.weight.view(-1, *self.patch_size, self.channels)
            x = self.ops.patch_embed(
                images, weight, self.proj.bias, pad=self.dynamic_img_pad,
                input_norm=(norm.weight, norm.bias, norm.eps),
            )  # fmt: skip
        else:
            rows = reference.patch_rows(self.prepare(images), self.patch_size, "hwc")
            if plain(self.input_norm, *NORMS) and plain(self.proj, nn.Linear) and not any_global_hook():
                x = self.ops.linear(rows, self.proj.weight, self.proj.bias, **norm_args(self.input_norm))
            else:
                x = self.proj(self.input_norm(rows))
        return run_norm(self.norm, x, self.ops)

    def _laid_out(self, x: Tensor, images: Tensor) -> Tensor:
        """Tokens [B, N, D] in the layout `output_fmt`."""
        if self.output_fmt not in ("NCHW", "NHWC", "NLC", "NCL"):
            raise ValueError(f"PatchEmbed: output_fmt must be 'NCHW', 'NHWC', 'NLC' or 'NCL', got {self.output_fmt!r}")
        if self.output_fmt in ("NLC", "NCL"):
            return x if self.output_fmt == "NLC" else x.transpose(1, 2)
        x = x.unflatten(1, self.grid_of(tuple(images.shape[2:])))
        return x if self.output_fmt == "NHWC" else x.permute(0, 3, 1, 2)

    def why_not_fused(self) -> list[str]:
        """What keeps the patch projection from running as an op."""
        hooks = ["a global module hook is registered"] if any_global_hook() else []
        if self.input_norm is not None:
            return hooks + reasons_of([("proj", self.proj, nn.Linear), ("input_norm", self.input_norm, *NORMS)])
        reasons = hooks + reasons_of([("patch_embed", self, PatchEmbed), ("proj", self.proj, nn.Conv2d)])
        if not reasons and not self.cuts_patches():
            return [f"proj has another kernel, stride, padding, dilation or groups than a {self.patch_size} patch"]
        return reasons


stands_for(PatchEmbed)
