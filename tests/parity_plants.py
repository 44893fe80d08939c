"""Differences planted in a timm model, as code of its own has them and not as the diagnosis tries them."""

import copy
import functools
import types

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitfast

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
BASES = {
    # class token, registers, LayerScale
    "token": {"init_values": 0.1, "reg_tokens": 2},
    # the mean of the patches, norm after pooling, positions of patches alone
    "mean": {"global_pool": "avg", "no_embed_class": True},
    # of CLIP: a norm before the blocks
    "clip": {"pre_norm": True, "act_layer": "quick_gelu", "norm_layer": functools.partial(nn.LayerNorm, eps=1e-5)},
    # positions are resampled at the call
    "dynamic": {"dynamic_img_size": True},
}


@torch.no_grad()
def base(name, seed=0, **changes):
    """timm's model with weights like trained ones, ours with the same, and images."""
    torch.manual_seed(seed)
    theirs = VisionTransformer(**SIZES | BASES[name] | changes)
    for key, p in theirs.named_parameters():
        if key.endswith("gamma"):
            p.uniform_(-1.5, 0.5).exp_()
        elif p.dim() == 1 and key.endswith("weight"):
            p.normal_(std=0.3).exp_()
        else:
            p.normal_(std=0.3 if p.dim() != 2 else p.shape[1] ** -0.5)
    size = (48, 32) if name == "dynamic" else (32, 32)
    return theirs.eval(), vitfast.load(theirs), torch.randn(2, 3, *size)


def each(model, kind, change):
    for module in model.modules():
        if isinstance(module, kind):
            change(module)


def eps(value):
    return lambda model: each(model, nn.LayerNorm, lambda norm: setattr(norm, "eps", value))


def act(new):
    def plant(model):
        for block in model.blocks:
            block.mlp.act = new()

    return plant


class Quick(nn.Module):
    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def qkv(rows):
    """Rows of the projection written otherwise."""

    def plant(model):
        for block in model.blocks:
            for p in (block.attn.qkv.weight, block.attn.qkv.bias):
                p.copy_(rows(p, block.attn))

    return plant


def order(*names):
    return qkv(lambda p, _: torch.cat([p.chunk(3)["qkv".index(name)] for name in names]))


by_head = qkv(
    lambda p, attn: torch.stack([w.unflatten(0, (attn.num_heads, -1)) for w in p.chunk(3)], 1).reshape(p.shape)
)


def heads(count):
    def plant(model):
        for block in model.blocks:
            attn = block.attn
            attn.num_heads, attn.head_dim = count, attn.attn_dim // count
            attn.scale = attn.head_dim**-0.5

    return plant


def pool(name):
    def plant(model):
        model.global_pool = name

    return plant


def norm_after_pooling(model):
    model.fc_norm, model.norm = model.norm, nn.Identity()


def norm_before_pooling(model):
    model.fc_norm, model.norm = nn.Identity(), model.fc_norm


def no_layer_scale(model):
    for block in model.blocks:
        block.ls1 = block.ls2 = nn.Identity()


def positions(change):
    def plant(model):
        model.pos_embed.copy_(change(model.pos_embed, model).clone())

    return plant


def bicubic_without_filter(model):
    """As Hugging Face's ViT."""

    def _pos_embed(self, x):
        B, H, W, C = x.shape
        rows = self.pos_embed
        grid = rows[:, 1:].reshape(1, 4, 4, C).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, size=(H, W), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
        rows = torch.cat([rows[:, :1], grid], 1)
        return torch.cat([self.cls_token.expand(B, -1, -1), x.flatten(1, 2)], 1) + rows

    model._pos_embed = types.MethodType(_pos_embed, model)


def registers_first(model):
    """Class token after the registers, as some ports order them; pooling still reads the class token's row 0."""
    kept = model._pos_embed

    def _pos_embed(self, x):
        x = kept(x)
        return torch.cat([x[:, 1:3], x[:, :1], x[:, 3:]], 1)

    model._pos_embed = types.MethodType(_pos_embed, model)


def no_class_token(model):
    kept = model._pos_embed
    model._pos_embed = types.MethodType(lambda self, x: kept(x)[:, 1:], model)


def pixels(change):
    def plant(model):
        weight = model.patch_embed.proj.weight
        weight.copy_(change(weight).clone())

    return plant


def hwc(weight):
    """The numbers of a projection of (row, column, channel) read as (channel, row, column)."""
    D, C, h, w = weight.shape
    return weight.permute(0, 2, 3, 1).reshape(D, -1).reshape(D, C, h, w)


def statistics(mean, std, own_mean=(0.485, 0.456, 0.406), own_std=(0.229, 0.224, 0.225)):
    """Pixels that were normalised by other numbers, undone and done anew by the first projection."""

    def plant(model):
        conv = model.patch_embed.proj
        m, s, n, t = (torch.tensor(v).view(1, 3, 1, 1).to(conv.weight) for v in (own_mean, own_std, mean, std))
        conv.bias.add_((conv.weight * ((m - n) / t)).sum((1, 2, 3)))
        conv.weight.mul_(s / t)

    return plant


class Rounded(nn.Linear):
    """A linear layer whose operands lose bits."""

    bits = 13

    def forward(self, x):
        def kept(t):
            whole, exponent = torch.frexp(t.double())
            return torch.ldexp((whole * 2 ** (24 - self.bits)).round() / 2 ** (24 - self.bits), exponent).to(t.dtype)

        return F.linear(kept(x), kept(self.weight), self.bias)


class Bf16(Rounded):
    bits = 16


def precision(kind):
    def plant(model):
        for block in model.blocks:
            for linear in (block.mlp.fc1, block.mlp.fc2):
                linear.__class__ = kind

    return plant


def zero(path):
    def plant(model):
        holder, _, name = path.rpartition(".")
        getattr(model.get_submodule(holder), name).zero_()

    return plant


# name -> (base, plant, what the diagnosis has to say)
SINGLES = {
    "eps 1e-5": ("token", eps(1e-5), "eps"),
    "eps 1e-12": ("token", eps(1e-12), "eps"),
    "eps 1e-6 of CLIP": ("clip", eps(1e-6), "eps"),
    "gelu tanh": ("token", act(lambda: nn.GELU("tanh")), "gelu"),
    "gelu quick": ("mean", act(Quick), "gelu"),
    "gelu erf": ("clip", act(nn.GELU), "gelu"),
    "k, q, v": ("token", order("k", "q", "v"), "qkv order"),
    "v, q, k": ("mean", order("v", "q", "k"), "qkv order"),
    "q, v, k": ("clip", order("q", "v", "k"), "qkv order"),
    "rows by head": ("token", by_head, "head split"),
    "two heads": ("token", heads(2), "heads"),
    "eight heads": ("mean", heads(8), "heads"),
    "mean of patches": ("token", pool("avg"), "pooling"),
    "class token": ("mean", pool("token"), "pooling"),
    "norm after pooling": ("token", norm_after_pooling, "norm and pooling"),
    "norm before pooling": ("mean", norm_before_pooling, "norm and pooling"),
    "no LayerScale": ("token", no_layer_scale, "layer scale"),
    "bicubic without filter": ("dynamic", bicubic_without_filter, "resampling"),
    "no positions": ("token", positions(lambda rows, _: torch.zeros_like(rows)), "positions"),
    "positions one further on": ("token", positions(lambda rows, _: rows.roll(1, 1)), "positions"),
    "no positions of prefix": (
        "token",
        positions(lambda rows, m: torch.cat([torch.zeros_like(rows[:, :3]), rows[:, 3:]], 1)),
        "positions",
    ),
    "registers first": ("token", registers_first, "prefix"),
    "no class token": ("token", no_class_token, "prefix"),
    "class token of zeros": ("token", zero("cls_token"), "prefix"),
    "blue, green, red": ("token", pixels(lambda w: w.flip(1)), "channel order"),
    "rows, columns, channels": ("token", pixels(hwc), "pixel order"),
    "columns, rows": ("mean", pixels(lambda w: w.transpose(2, 3)), "pixel order"),
    "mean and std of 0.5": ("token", statistics((0.5,) * 3, (0.5,) * 3), "mean and std"),
    "no mean and std": ("mean", statistics((0.0,) * 3, (1.0,) * 3), "mean and std"),
    "TF32": ("token", precision(Rounded), "precision"),
    "bf16": ("mean", precision(Bf16), "precision"),
    "no bias of qkv": ("token", zero("blocks.0.attn.qkv.bias"), "bias"),
    "no bias of fc1": ("token", zero("blocks.1.mlp.fc1.bias"), "bias"),
    "no bias of the classifier": ("token", zero("head.bias"), "bias"),
}
# two of the above, both planted
PAIRS = [
    ("eps 1e-5", "gelu tanh"), ("eps 1e-5", "k, q, v"), ("eps 1e-12", "rows by head"), ("eps 1e-5", "no LayerScale"),
    ("eps 1e-5", "mean of patches"), ("gelu tanh", "k, q, v"), ("gelu quick", "eight heads"),
    ("gelu tanh", "no LayerScale"),
    ("gelu tanh", "norm after pooling"), ("k, q, v", "rows by head"), ("k, q, v", "two heads"),
    ("rows by head", "two heads"), ("no LayerScale", "two heads"), ("blue, green, red", "gelu tanh"),
    ("rows, columns, channels", "blue, green, red"), ("mean and std of 0.5", "blue, green, red"),
    ("no positions", "eps 1e-5"), ("registers first", "gelu tanh"), ("positions one further on", "registers first"),
    ("mean and std of 0.5", "no positions"), ("class token", "norm before pooling"), ("no class token", "eps 1e-5"),
    ("gelu erf", "eps 1e-6 of CLIP"), ("no LayerScale", "rows by head"), ("v, q, k", "class token"),
]  # fmt: skip


@torch.no_grad()
def planted(model, *names):
    changed = copy.deepcopy(model)
    for name in names:
        SINGLES[name][1](changed)
    return changed
