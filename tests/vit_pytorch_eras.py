"""vit-pytorch's ViT and SimpleViT as their releases compute them, from a state dict, in plain torch.

`layouts/vit_pytorch_<release>.json` has the names and shapes of each; with the releases themselves, these functions
were compared once (0.7.0 to 1.26.11).
"""

import json
from pathlib import Path

import torch
from torch.nn.functional import gelu, layer_norm, linear

LAYOUTS = Path(__file__).parent / "layouts"
RELEASES = ("0.9.3", "0.40.2", "1.2.9", "1.6.9", "1.16.0", "1.26.11")
# (release, class, pool)
MODELS = [
    *((release, "ViT", pool) for release in RELEASES for pool in ("cls", "mean")),
    *((release, "SimpleViT", "mean") for release in RELEASES[1:]),
]
PATCH, HEADS = 8, 2


def recorded(release, kind="ViT", pool="cls"):
    """Names and shapes of a model for images of 32 x 32; until 1.15 they are the same for both ways of pooling."""
    models = json.loads((LAYOUTS / f"vit_pytorch_{release}.json").read_text())[kind]
    return models.get(pool, models.get("cls"))


def drawn(release, kind="ViT", pool="cls", image=(32, 32)):
    """A state dict of that release."""
    state = {}
    for name, shape in recorded(release, kind, pool).items():
        if name == "pos_embedding":
            shape[-2] += (image[0] // PATCH) * (image[1] // PATCH) - 16
        # gains of norms around one
        state[name] = 0.15 * torch.randn(shape) + float(len(shape) == 1 and name.endswith("weight"))
    return state


def norm(state, name, x):
    return layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], 1e-5)


def dense(state, name, x):
    return linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))


def names_of(state):
    """Where a block has its parts: (norm, attention, second norm, first and second linear)."""
    if "transformer.layers.0.0.fn.fn.to_qkv.weight" in state:
        return "0.fn.norm", "0.fn.fn", "1.fn.norm", "1.fn.fn.net.0", "1.fn.fn.net.3"
    if "transformer.layers.0.0.fn.to_qkv.weight" in state:
        return "0.norm", "0.fn", "1.norm", "1.fn.net.0", "1.fn.net.3"
    second = "1.net.4" if "transformer.layers.0.1.net.4.weight" in state else "1.net.3"
    return "0.norm", "0", "1.net.0", "1.net.1", second


def attention(state, name, x, heads):
    query, key, value = (
        part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in dense(state, f"{name}.to_qkv", x).chunk(3, dim=-1)
    )
    weights = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(dim=-1)
    out = (weights @ value).transpose(1, 2).flatten(2)
    if f"{name}.to_out.weight" in state:
        return dense(state, f"{name}.to_out", out)
    return dense(state, f"{name}.to_out.0", out) if f"{name}.to_out.0.weight" in state else out


def sines(rows, columns, D):
    """Positions of SimpleViT, one number after another."""
    found = torch.empty(rows * columns, D)
    for n in range(rows * columns):
        at = {"y": n // columns, "x": n % columns}
        parts = [(axis, wave) for axis in "xy" for wave in (torch.sin, torch.cos)]
        for part, (axis, wave) in enumerate(parts):
            for i in range(D // 4):
                frequency = 10000 ** (-i / (D // 4 - 1))
                found[n, part * (D // 4) + i] = wave(torch.tensor(at[axis] * frequency, dtype=torch.float64))
    return found


def tokens(state, images, heads=HEADS, patch=PATCH):
    """What the release's `transformer` gives, and in the pixel order of vit-pytorch's Rearrange what goes in."""
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    x = torch.stack([
        images[:, :, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].permute(0, 2, 3, 1).flatten(1)
        for r in range(rows) for c in range(columns)
    ], dim=1)  # fmt: skip
    if "to_patch_embedding.3.weight" in state:
        x = norm(state, "to_patch_embedding.1", x)
        x = norm(state, "to_patch_embedding.3", dense(state, "to_patch_embedding.2", x))
    else:
        x = dense(state, "to_patch_embedding.1", x)
    if "pos_embedding" in state:
        D = x.shape[-1]
        x = torch.cat([state["cls_token"].reshape(1, -1, D).expand(len(x), -1, -1), x], dim=1)
        x = x + state["pos_embedding"].reshape(1, -1, D)[:, : x.shape[1]]
    else:
        x = x + sines(rows, columns, x.shape[-1]).to(x)
    norm1, attn, norm2, fc1, fc2 = names_of(state)
    depth = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("transformer.layers."))
    for at in (f"transformer.layers.{i}." for i in range(depth)):
        x = x + attention(state, at + attn, norm(state, at + norm1, x), heads)
        x = x + dense(state, at + fc2, gelu(dense(state, at + fc1, norm(state, at + norm2, x))))
    return norm(state, "transformer.norm", x) if "transformer.norm.weight" in state else x


def logits(state, images, pool, heads=HEADS, patch=PATCH):
    x = tokens(state, images, heads, patch)
    x = x[:, 0] if pool == "cls" else x.mean(dim=1)
    head = "linear_head" if any(name.startswith("linear_head") for name in state) else "mlp_head"
    if f"{head}.0.weight" in state:
        return dense(state, f"{head}.1", norm(state, f"{head}.0", x))
    return dense(state, head, x)
