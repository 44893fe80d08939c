"""timm's models and ours with the same weights, made to resemble trained ones."""

import timm
import torch
from torch import nn

import vitfast

# family -> (timm's name, what differs from it); the real widths and head dims, at small depth on small images
FAMILIES = {
    "vit": ("vit_tiny_patch16_224", {"img_size": (48, 32)}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 48}),
    "dinov2_reg4": ("vit_small_patch14_reg4_dinov2", {"img_size": (28, 42)}),
    "dinov2_giant": ("vit_giant_patch14_dinov2", {"img_size": 42}),
    "siglip_map": ("vit_so400m_patch14_siglip_224", {"img_size": 42}),
    "siglip_gap": ("vit_base_patch16_siglip_gap_224", {"img_size": 48}),
    "clip": ("vit_base_patch16_clip_quickgelu_224", {"img_size": (32, 48)}),
    "aimv2": ("aimv2_large_patch14_224", {"img_size": 42}),
    "beit3": ("beit3_base_patch16_224", {"img_size": 48}),
    "beit3_giant": ("beit3_giant_patch14_224", {"img_size": 28}),
    "huge": ("vit_huge_patch14_224", {"img_size": 42}),
    "radio": ("vit_base_patch16_radio_v3", {"img_size": 48}),
    "reg4_gap": ("vit_medium_patch16_reg4_gap_256", {"img_size": 48}),
    "eva_gap": ("eva_large_patch14_196", {"img_size": (28, 42)}),
    "no_positions": ("vit_tiny_patch16_224", {"img_size": 48, "pos_embed": "none"}),
    "qk_norm": ("vit_small_patch16_224", {"img_size": 48, "qk_norm": True}),
    "test_vit": ("test_vit", {"img_size": 64}),
    "test_vit2": ("test_vit2", {"img_size": 64}),
    "test_vit3": ("test_vit3", {"img_size": (64, 48)}),
    "test_vit4": ("test_vit4", {"img_size": 64}),
}
MASSIVE = 7  # the channel that gets massive activations


@torch.no_grad()
def make_trained_like(model, images, massive=True):
    """Fill every parameter with what trained ViTs have, rounded to bf16 so that all dtypes share one reference.

    Gains of norms up to 10, biases, LayerScale gammas over two decades, and one channel in which every MLP writes
    1e3 into a few tokens (Sun et al., "Massive Activations in Large Language Models", 2024, saw them in ViTs too);
    not so without `massive`.
    """
    for name, p in model.named_parameters():
        owner, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if kind == "gamma":
            p.uniform_(-2, 0).copy_(10**p)
        elif kind in ("cls_token", "reg_token", "dist_token", "pos_embed", "latent"):
            p.normal_(std=0.5)
        elif kind == "bias":
            p.normal_(std=0.3)
        elif isinstance(owner, (nn.Linear, nn.Conv2d)):
            p.normal_(std=0.7 * p[0].numel() ** -0.5)
        else:
            p.normal_(std=0.4).exp_()
            p[:: max(p.numel() // 4, 1)] = 10
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight[MASSIVE] = 0.1
        if hasattr(block.ls2, "gamma"):
            block.ls2.gamma[MASSIVE] = 1
    blocks = model.blocks if massive else ()
    hooks = [block.mlp.register_forward_pre_hook(_write_massive_activations) for block in blocks]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.copy_(p.bfloat16())
    return model.train()


def _write_massive_activations(mlp, args):
    """Let one hidden unit be open for the three tokens that fit it best, and write 1e3 into one channel there."""
    gate = mlp.fc1 if hasattr(mlp, "fc1") else mlp.fc1_g
    best = (args[0] @ gate.weight[0]).flatten().topk(4).values
    gate.weight[0] *= 4 / (best[0] - best[3])
    if gate.bias is not None:
        gate.bias[0] = -4 * best[3] / (best[0] - best[3])
    mlp.fc2.weight[MASSIVE] = 0
    mlp.fc2.weight[MASSIVE, 0] = 1
    channel = mlp.forward(args[0])[..., MASSIVE]
    mlp.fc2.weight[MASSIVE, 0] = 1e3 / (channel.amax() - channel.amin())


def names_of(family, **changes):
    name, own = FAMILIES[family]
    return name, {"depth": 2, "num_classes": 10} | own | changes


def build_pair(family="vit", batch=2, massive=True, **changes):
    """timm's model and ours with the same weights, in training mode, and images for them that are exact in bf16."""
    name, keywords = names_of(family, **changes)
    return pair_of(name, batch, massive, **keywords)


def pair_of(name, batch=2, massive=True, **keywords):
    # on meta: both spend most of their time on initialisation, which is replaced here
    with torch.device("meta"):
        theirs = timm.create_model(name, **keywords)
    ours = vitfast.create_model(name, device="meta", **keywords)
    images = torch.randn(batch, ours.config.channels, *ours.config.image_size).bfloat16().float()
    theirs = make_trained_like(theirs.to_empty(device="cpu"), images, massive)
    ours = ours.to_empty(device="cpu").train()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours, images


def run(model, images, cotangent=None):
    """Output, and the gradients by name of its product with `cotangent`; the same draws for every model."""
    model.zero_grad()
    torch.manual_seed(1)
    out = model(images)
    out.backward(torch.randn_like(out) if cotangent is None else cotangent.to(out.dtype))
    return out.detach(), {name: p.grad for name, p in model.named_parameters()}


def taps_of(timm_model, images):
    """timm's values at the stages that `ViT.intermediates` names; draws as in `run`."""
    taps, handles = {}, []

    def before(name, module):
        handles.append(module.register_forward_pre_hook(lambda _, args: taps.update({name: args[0]})))

    def after(name, module):
        handles.append(module.register_forward_hook(lambda _, args, out: taps.update({name: out})))

    before("patch_tokens", timm_model.blocks[0])
    for i, block in enumerate(timm_model.blocks):
        before(f"blocks.{i}.attn", block.norm2)
        after(f"blocks.{i}.mlp", block)
    after("tokens", timm_model.norm)
    torch.manual_seed(1)
    taps["logits"] = timm_model(images)
    taps["pooled"] = timm_model.forward_head(taps["tokens"], pre_logits=True)
    for handle in handles:
        handle.remove()
    return taps
