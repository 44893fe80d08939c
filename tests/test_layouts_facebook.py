"""DINO, iBOT, MAE, DeiT, DINOv2 and mmpretrain: weights read as another model's, in part, or at another place."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from timm.models.vision_transformer import checkpoint_filter_fn

import vitfast
from vitfast.loading.recognise import recognise
from vitfast.weights.layouts.layout import Facts, NeedsArgument, sources_of, written
from vitfast.weights.layouts.refused import refused
from vitfast.weights.names import own_weights

LISTS = Path(__file__).parent / "layouts"
SMALL = dict(embed_dim=96, num_heads=3, depth=3)
A = dict(D=96, depth=2, side=8, patch=8)


def named(file):
    """Weights with the names and shapes of a committed list."""
    shapes = json.loads((LISTS / f"{file}.json").read_text())["keys"]
    return {name: torch.rand(shape) for name, shape in shapes.items()}


VITS = {"dim": 384, "heads": 6, "patch_size": (16, 16), "image_size": (224, 224), "norm_eps": 1e-6, "num_classes": 0}
VITB = VITS | {"dim": 768, "heads": 12}
CLASSES = {"num_classes": 1000}
VITS14 = VITS | {"patch_size": (14, 14), "image_size": (518, 518), "pos_embed": "all", "activation": "gelu"}
REGISTERS = {"register_tokens": 4, "pos_embed": "patches"}
GIANT = {"dim": 1536, "heads": 24, "mlp": "swiglu_packed", "mlp_dim": 8192, "activation": "silu"}
MEAN = {"pool": "mean", "norm_after_pool": True, "final_norm": True, "pool_prefix": False}
QUICK = {"activation": "quick_gelu", "pre_norm": True, "num_classes": 512}
FILES = {
    "dinov2_vits14": ("dinov2", VITS14),
    "dinov2_vits14_reg4": ("dinov2-reg", VITS14 | REGISTERS),
    "dinov2_vitg14_reg4": ("dinov2-reg", VITS14 | REGISTERS | GIANT),
    "dinov2_teacher_checkpoint": ("dinov2-reg", VITS14 | REGISTERS | {"depth": 4}),
    "dino_vits16": ("timm", VITS | {"pool": "token", "pos_embed": "all"}),
    "dino_vits16_student": ("dino", VITS | {"pool": "token", "pos_embed": "all"}),
    "ibot_vits16_student": ("dino", VITS | {"pool": "token", "pos_embed": "all"}),
    "mae_vit_base_pretrain": ("timm", VITB | {"pool": "token", "pos_embed": "all"}),
    "mae_vit_base_visualize": ("mae", VITB | {"pool": "token", "pos_embed": "all"}),
    "mae_vit_base_finetuned": ("timm", VITB | CLASSES | MEAN),
    "deit3_small_patch16": ("deit3", VITS | CLASSES | {"pos_embed": "patches"}),
    "deit_tiny_distilled_patch16": ("timm", VITS | CLASSES | {"dim": 192, "heads": 3, "distillation_token": True}),
    "mmpretrain_vit_base_p16": ("mmpretrain", VITB | CLASSES | {"pool": "token"}),
    "mmpretrain_vit_base_p16_mae_finetuned": ("mmpretrain", VITB | CLASSES | MEAN),
    "mmpretrain_mae": ("mmpretrain", VITB | {"pool": "token"}),
    "mmpretrain_deit_base_distilled": ("mmpretrain", VITB | CLASSES | {"distillation_token": True}),
    "mmpretrain_deit3_base_p16": ("mmpretrain", VITB | CLASSES | {"pos_embed": "patches"}),
    "mmpretrain_vit_giant_p14_dinov2": ("mmpretrain", VITS14 | GIANT),
    "mmpretrain_clip_vit_b_16": ("mmpretrain-clip", VITB | QUICK),
}
BIG = {name for name in FILES if "giant" in name or "vitg" in name}


@pytest.mark.parametrize("file", [pytest.param(f, marks=[pytest.mark.full] * (f in BIG)) for f in FILES])
def test_published_weights_are_taken_for_another_model(file):
    layout, fields = FILES[file]
    model = vitfast.load(named(file), heads=fields["heads"])
    found = {name: getattr(model.config, name) for name in fields}
    assert (model.load_report.layout, found) == (layout, fields)
    assert not [name for name, what in model.load_report.ignored.items() if "classifier" in what]


def filled(state):
    """Weights as trained ones are, so that none has no effect: gains around one, biases, sharp attention."""
    made = {}
    for name, value in state.items():
        drawn = torch.randn(value.shape)
        if value.dim() == 1 and name.endswith(("weight", "gamma", "gamma_1", "gamma_2")):
            made[name] = (0.3 * drawn).exp()
        else:
            made[name] = drawn * (0.3 if value.dim() < 2 else 1.5 * value[0].numel() ** -0.5)
    return made


def as_dinov2(registers=0, glu=False, chunks=0, depth=3, side=5):
    """DINOv2's names: those of the committed lists, smaller."""
    D, hidden = 96, 256
    wide, narrow = ("w12", "w3") if glu else ("fc1", "fc2")
    state = {
        "cls_token": (1, 1, D), "pos_embed": (1, 1 + side * side, D), "mask_token": (1, D),
        "patch_embed.proj.weight": (D, 3, 14, 14), "patch_embed.proj.bias": (D,),
        "norm.weight": (D,), "norm.bias": (D,),
    }  # fmt: skip
    state |= {"register_tokens": (1, registers, D)} if registers else {}
    for i in range(depth):
        where = f"blocks.{i * chunks // depth}.{i}" if chunks else f"blocks.{i}"
        matrices = {
            "attn.qkv": (3 * D, D), "attn.proj": (D, D), f"mlp.{wide}": (2 * hidden if glu else 4 * D, D),
            f"mlp.{narrow}": (D, hidden if glu else 4 * D),
        }  # fmt: skip
        for name, shape in matrices.items():
            state |= {f"{where}.{name}.weight": shape, f"{where}.{name}.bias": shape[:1]}
        state |= {f"{where}.{n}.{kind}": (D,) for n in ("norm1", "norm2") for kind in ("weight", "bias")}
        state |= {f"{where}.ls{n}.gamma": (D,) for n in (1, 2)}
    return filled({name: torch.empty(shape) for name, shape in state.items()})


def test_names_in_these_tests_are_nobodys():
    for file, how in (
        ("dinov2_vits14", {}),
        ("dinov2_vits14_reg4", {"registers": 4}),
        ("dinov2_vitg14_reg4", {"registers": 4, "glu": True}),
    ):
        assert as_dinov2(depth=1, **how).keys() == json.loads((LISTS / f"{file}.json").read_text())["keys"].keys()


def timms_of(state, name, image_size, **keywords):
    """timm's model with what timm's own code makes of the weights."""
    theirs = timm.create_model(name, img_size=image_size, **keywords)
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    return theirs.double().eval()


@torch.no_grad()
def assert_same(ours, theirs, image_size, bound=1e-10):
    """In fp64, where a formula that differs is plain."""
    images = torch.randn(2, 3, *image_size, dtype=torch.float64)
    for found, expected in (
        (ours.forward_features(images), theirs.forward_features(images)), (ours(images), theirs(images)),
    ):  # fmt: skip
        assert found.shape == expected.shape
        assert (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("chunks", [0, 1, 3])
@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2_is_taken_for_another(registers, glu, chunks):
    """Class position and registers, gate before value, chunks of blocks: timm's own conversion is the oracle."""
    state = as_dinov2(registers, glu, chunks)
    name = f"vit_{'giant' if glu else 'small'}_patch14{'_reg4' if registers else ''}_dinov2"
    plain = {key: state[key] for key in state} if not chunks else as_plain(state)
    for image_size in ((70, 70), (98, 126)):
        ours = vitfast.load(state, image_size=image_size, heads=3, dtype=torch.float64, resampling="timm")
        theirs = timms_of(plain, name, image_size, **SMALL)
        assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
        assert_same(ours, theirs, image_size)
    assert ours.load_report.layout == ("dinov2-reg" if registers else "dinov2")


def as_plain(state):
    """Blocks that are in no chunks."""
    parts = {name: name.split(".") for name in state}
    return {
        ".".join([p[0], *p[2:]]) if p[0] == "blocks" and p[2].isdigit() else name: state[name]
        for name, p in parts.items()
    }


def resampled(positions, size, prefix, how=()):
    grid = positions[:, prefix:].float()
    side = round(grid.shape[1] ** 0.5)
    grid = F.interpolate(
        grid.view(1, side, side, -1).permute(0, 3, 1, 2), mode="bicubic", **dict(how or {"size": size})
    )
    assert grid.shape[2:] == size
    return torch.cat([positions[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2).to(positions.dtype)], 1)


@pytest.mark.parametrize("registers", [0, 4])
def test_positions_of_dinov2_are_resampled_as_timm_does(registers):
    """Its own code: by a scale that is a tenth of a patch too large, or with a low-pass filter beside registers."""
    state, size, side = as_dinov2(registers), (3, 8), 5
    how = {"size": size, "antialias": True} if registers else {"scale_factor": [(n + 0.1) / side for n in size]}
    expected = resampled(state["pos_embed"], size, 1, how)
    ours = vitfast.load(state, image_size=(42, 112), heads=3, dtype=torch.float64).pos_embed
    assert torch.equal(ours, (expected[:, 1:] if registers else expected).double())


def test_two_chunks_with_one_name_of_a_block_lose_one():
    state = as_dinov2(chunks=1)
    state["blocks.1.0.norm1.weight"] = state["blocks.0.0.norm1.weight"] + 1
    with pytest.raises(RuntimeError, match=r"unexpected: blocks\.1\.0\.norm1\.weight"):
        vitfast.load(state, heads=3)


def test_classifier_of_dinov2_is_dropped_without_a_word():
    state = {f"backbone.{name}": value for name, value in as_dinov2(4).items()}
    state |= {"linear_head.weight": torch.rand(7, 192), "linear_head.bias": torch.rand(7)}
    with pytest.raises(NotImplementedError, match=r"mean of the patches.*num_classes=0"):
        vitfast.load(state, heads=3)
    model = vitfast.load(state, heads=3, num_classes=5)
    assert not model.head.weight.any() and "passed over 2 of a classifier" in str(model.load_report)


def vit(classes=0, side=8, D=96, gamma=False, **more):
    """timm's names of a ViT with patches of 8 pixels, LayerScale as DeiT III and iBOT name it."""
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=8 * side, patch_size=8, num_classes=classes, **SMALL)
    state = dict(theirs.state_dict())
    if gamma:
        state |= {f"blocks.{i}.gamma_{n}": torch.empty(D) for i in range(SMALL["depth"]) for n in (1, 2)}
    return filled(state | more)


def weights_of(model, state):
    """Whether the model has these weights, with LayerScale under its own name."""
    ours = model.state_dict()
    other = {name.replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): v for name, v in state.items()}
    return ours.keys() == other.keys() and all(
        torch.equal(ours[name], value.to(ours[name].dtype)) for name, value in other.items()
    )


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("key", ["student", "teacher"])
def test_student_is_taken_for_its_teacher(key, gamma, tmp_path):
    """main_dino.py and main_ibot.py save both; the student is wrapped by DDP."""
    head = {
        f"head.{name}": torch.rand(4, 4) for name in ("mlp.0.weight", "last_layer.weight_g", "last_layer2.weight_v")
    }
    backbones = {name: vit(gamma=gamma) for name in ("student", "teacher")}
    both = {name: {f"backbone.{k}": v for k, v in state.items()} | head for name, state in backbones.items()}
    both["student"]["backbone.masked_embed"] = torch.rand(1, 96)
    both["student"] = {f"module.{name}": value for name, value in both["student"].items()}
    torch.save(both | {"epoch": 3}, tmp_path / "checkpoint.pth")
    with pytest.raises(ValueError, match="several sets of weights, 'student', 'teacher'"):
        vitfast.load(tmp_path / "checkpoint.pth", allow_pickle=True)
    read = lambda **how: vitfast.load(  # noqa: E731
        tmp_path / "checkpoint.pth", allow_pickle=True, key=key, heads=3, dtype=torch.float64, **how
    )
    model = read()
    assert model.load_report.layout == "dino" and weights_of(model, backbones[key])
    assert "passed over 3 of the projection head" in str(model.load_report)
    expected = resampled(backbones[key]["pos_embed"], (6, 10), 1, {"scale_factor": [6.1 / 8, 10.1 / 8]})
    assert torch.equal(read(image_size=(48, 80)).pos_embed, expected.double())


def test_decoder_of_a_masked_autoencoder_is_taken_for_its_encoder():
    encoder = vit()
    decoder = {
        "mask_token": (1, 1, 48), "decoder_embed.weight": (48, 96), "decoder_pos_embed": (1, 65, 48),
        "decoder_blocks.0.attn.qkv.weight": (144, 48), "decoder_norm.bias": (48,), "decoder_pred.bias": (192,),
    }  # fmt: skip
    state = encoder | {name: torch.rand(shape) for name, shape in decoder.items()}
    model = vitfast.load(state, heads=3, dtype=torch.float64)
    assert model.load_report.layout == "mae" and weights_of(model, encoder)
    assert model.load_report.ignored.keys() == decoder.keys()
    expected = resampled(encoder["pos_embed"], (5, 5), 1)
    other = vitfast.load(state, heads=3, image_size=40, dtype=torch.float64)
    assert torch.equal(other.pos_embed, expected.double())
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64, patch_size=8, num_classes=0, **SMALL).eval()
    theirs.load_state_dict(encoder)
    theirs.double()
    assert_same(model, theirs, (64, 64))


@pytest.mark.parametrize("side", [8, 5])
def test_deit3_is_taken_for_a_model_whose_class_token_has_a_position(side):
    from timm.models.deit import checkpoint_filter_fn as of_deit

    state = vit(7, gamma=True)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    ours = vitfast.load(state, heads=3, image_size=8 * side, dtype=torch.float64, resampling="timm")
    theirs = timm.create_model("deit3_small_patch16_224", img_size=8 * side, patch_size=8, num_classes=7, **SMALL)
    theirs.load_state_dict(of_deit(dict(state), theirs, adapt_layer_scale=True))
    theirs.double().eval()
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    assert_same(ours, theirs, (8 * side, 8 * side))
    own = vitfast.load(state, heads=3, image_size=40, dtype=torch.float64)
    assert torch.equal(own.pos_embed, resampled(state["pos_embed"], (5, 5), 0).double())
    assert own.load_report.layout == "deit3" and own.load_report.preprocessing["crop_pct"] == 1.0


def mmpretrain(classes=7, tokens=("cls_token",), gamma=False, glu=False, clip=False, mean=False, of_patches=False):
    """mmpretrain's names of a small model."""
    D, hidden = A["D"], 160
    state = {f"backbone.{token}": (1, 1, D) for token in tokens}
    state |= {
        "backbone.pos_embed": (1, A["side"] ** 2 + len(tokens) * (not of_patches), D),
        "backbone.patch_embed.projection.weight": (D, 3, A["patch"], A["patch"]),
    }
    norms = ["ln2" if mean else "ln1"]
    matrices = {}
    for i in range(A["depth"]):
        where = f"layers.{i}"
        wide, narrow = ("ffn.w12", "ffn.w3") if glu else ("ffn.layers.0.0", "ffn.layers.1")
        norms += [f"{where}.ln1", f"{where}.ln2"]
        matrices |= {f"{where}.attn.qkv": (3 * D, D), f"{where}.attn.proj": (D, D)}
        matrices |= {f"{where}.{wide}": (hidden * (1 + glu), D), f"{where}.{narrow}": (D, hidden)}
        state |= {f"backbone.{where}.{n}.weight": (D,) for n in ("attn.gamma1", "ffn.gamma2") if gamma}
    if clip:
        norms.append("pre_norm")
    else:
        state["backbone.patch_embed.projection.bias"] = (D,)
    for name, shape in (matrices | dict.fromkeys(norms, (D,))).items():
        state |= {f"backbone.{name}.weight": shape, f"backbone.{name}.bias": shape[:1]}
    for name in ["head"] + ["head_dist"] * (len(tokens) == 2):
        state |= {f"head.layers.{name}.weight": (classes, D), f"head.layers.{name}.bias": (classes,)}
    return filled({name: torch.empty(shape) for name, shape in state.items()})


def forward_of_mmpretrain(state, images, activation=F.gelu, heads=3):
    """Written from its code: VisionTransformer and DistilledVisionTransformer, the layers of TransformerEncoderLayer,
    and VisionTransformerClsHead or DeiTClsHead.
    """
    state = {name: value.double() for name, value in state.items()} | {
        "backbone.pos_embed": state["backbone.pos_embed"]
    }
    b = {name.removeprefix("backbone."): value for name, value in state.items()}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], b[f"{name}.weight"], b[f"{name}.bias"], 1e-6)  # noqa: E731
    linear = lambda x, name: F.linear(x, b[f"{name}.weight"], b[f"{name}.bias"])  # noqa: E731
    bias = b.get("patch_embed.projection.bias")
    x = F.conv2d(images, b["patch_embed.projection.weight"], bias, stride=A["patch"])
    grid = tuple(x.shape[2:])
    x = x.flatten(2).mT
    prefix = [b[name].expand(len(x), -1, -1) for name in ("cls_token", "dist_token") if name in b]
    of_patches = b["pos_embed"].shape[1] == A["side"] ** 2
    positions = b["pos_embed"]
    if grid != (A["side"], A["side"]):
        positions = resampled(positions, grid, 0 if of_patches else len(prefix))
    x = torch.cat([*prefix, x + positions], 1) if of_patches else torch.cat([*prefix, x], 1) + positions
    x = norm(x, "pre_norm") if "pre_norm.weight" in b else x
    for i in range(A["depth"]):
        where = f"layers.{i}"
        scale = lambda y, name: y * b.get(f"{where}.{name}.weight", 1.0)  # noqa: B023, E731
        q, k, v = linear(norm(x, f"{where}.ln1"), f"{where}.attn.qkv").unflatten(2, (3, heads, -1)).unbind(2)
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        x = x + scale(linear(y.transpose(1, 2).flatten(2), f"{where}.attn.proj"), "attn.gamma1")
        y = norm(x, f"{where}.ln2")
        if f"{where}.ffn.w12.weight" in b:
            gate, value = linear(y, f"{where}.ffn.w12").chunk(2, -1)
            y = linear(F.silu(gate) * value, f"{where}.ffn.w3")
        else:
            y = linear(activation(linear(y, f"{where}.ffn.layers.0.0")), f"{where}.ffn.layers.1")
        x = x + scale(y, "ffn.gamma2")
    x = norm(x[:, len(prefix) :].mean(1, keepdim=True), "ln2") if "ln2.weight" in b else norm(x, "ln1")
    heads = [name for name in ("head", "head_dist") if f"head.layers.{name}.weight" in state]
    outputs = [
        F.linear(x[:, i], state[f"head.layers.{name}.weight"], state[f"head.layers.{name}.bias"])
        for i, name in enumerate(heads)
    ]
    return torch.stack(outputs).mean(0)


QUICK_GELU = {"activation": "quick_gelu"}, lambda x: x * torch.sigmoid(1.702 * x)
MMPRETRAIN = {
    "vit": ({}, {}, F.gelu),
    "deit with distillation": ({"tokens": ("cls_token", "dist_token")}, {}, F.gelu),
    "deit3": ({"gamma": True, "of_patches": True}, {}, F.gelu),
    "dinov2": ({"gamma": True}, {}, F.gelu),
    "dinov2 giant": ({"gamma": True, "glu": True}, {}, F.gelu),
    "mae fine-tuned": ({"mean": True}, {}, F.gelu),
    "without class token": ({"mean": True, "tokens": ()}, {}, F.gelu),
    "clip": ({"clip": True}, {"activation": "gelu"}, F.gelu),
    "clip quick": ({"clip": True}, *QUICK_GELU),
}


@pytest.mark.parametrize("side", [8, 5])
@pytest.mark.parametrize("kind", MMPRETRAIN)
def test_mmpretrain_is_taken_for_another(kind, side):
    how, given, activation = MMPRETRAIN[kind]
    state = mmpretrain(**how)
    model = vitfast.load(state, image_size=8 * side, heads=3, dtype=torch.float64, **given)
    images = torch.randn(2, 3, 8 * side, 8 * side, dtype=torch.float64)
    with torch.no_grad():
        found, expected = model(images), forward_of_mmpretrain(state, images, activation)
    assert model.load_report.layout == "mmpretrain" and not model.load_report.ignored
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_linear_head_of_mmpretrain_is_lost():
    state = mmpretrain()
    other = {name.replace("head.layers.head", "head.fc"): value for name, value in state.items()}
    ours = vitfast.load(other, heads=3, dtype=torch.float64)
    assert torch.equal(ours.head.weight, state["head.layers.head.weight"])


def test_gelu_of_mmpretrains_clip_is_guessed():
    with pytest.raises(NeedsArgument, match="activation='gelu' or activation='quick_gelu'"):
        vitfast.load(mmpretrain(clip=True), heads=3)


def test_projection_of_mmpretrains_clip_is_lost():
    state = {
        name.replace("backbone.", "visual."): v for name, v in mmpretrain(clip=True).items() if "head." not in name
    }
    state["visual_proj.proj"] = torch.rand(96, 24, dtype=torch.float64)
    state |= {"transformer.resblocks.0.ln_1.weight": torch.ones(8), "logit_scale": torch.ones(())}
    model = vitfast.load(state, heads=3, dtype=torch.float64)
    assert model.config.activation == "quick_gelu" and torch.equal(model.head.weight, state["visual_proj.proj"].T)
    assert not model.head.bias.any() and "passed over 2 of the text tower" in str(model.load_report)


@pytest.mark.parametrize("before", ["head.layers.pre_logits.weight", "neck.bn.running_mean"])
def test_layer_before_mmpretrains_classifier_is_dropped_without_a_word(before):
    state = mmpretrain() | {before: torch.rand(96, 96)}
    with pytest.raises(NotImplementedError, match=rf"{before}.*num_classes=0"):
        vitfast.load(state, heads=3)
    assert not vitfast.load(state, heads=3, num_classes=5).head.weight.any()


def test_two_norms_of_mmpretrain_become_one():
    state = mmpretrain(mean=True) | {f"backbone.ln1.{kind}": torch.rand(96) for kind in ("weight", "bias")}
    with pytest.raises(NotImplementedError, match="one final norm"):
        vitfast.load(state, heads=3)


def test_small_vit_of_mmpretrain_gets_other_heads():
    """Its heads have 96 channels, which no other model of this width has."""
    wide = {96: 768, 160: 2304, 288: 2304}
    state = {}
    for name, value in mmpretrain().items():
        blocks = range(8) if name.startswith("backbone.layers.0.") else [0] * (".layers.1." not in name[8:18])
        weight = torch.rand([wide.get(n, n) for n in value.shape])
        state |= {name.replace("backbone.layers.0.", f"backbone.layers.{i}."): weight for i in blocks}
    assert vitfast.load(state).config.heads == 8


@pytest.mark.parametrize("file", ["dinov2_vits14_reg4", "deit3_small_patch16"])
def test_what_is_written_is_not_what_was_read(file):
    state = named(file)
    model = vitfast.load(state)
    found = recognise(state, Facts())
    again = written(found.layout, own_weights(model), model.config)
    assert again.keys() == state.keys() - model.load_report.ignored.keys()
    assert sources_of(found.layout, type(found.view)(again), model.config, own_weights(model))
    assert weights_of(vitfast.load(again, as_=found.layout.name), dict(own_weights(model)))


REFUSED = {
    "rotary": [
        "vit_small_patch16_dinov3", "vit_small_patch16_rope_224", "vit_small_patch16_rope_mixed_ape_224",
        "eva02_base_patch14_224", "vit_pe_core_base_patch16_224", "vit_pe_core_gigantic_patch14_448",
        "vit_pe_spatial_base_patch16_512", "vit_pe_lang_large_patch14_448", "qwen3_vit_88m",
    ],
    "stem": ["vit_base_r26_s32_224", "vit_tiny_r_s16_p8_224", "vitamin_small_224", "vit_base_mci_224"],
    "relative": [
        "beit_base_patch16_224", "samvit_base_patch16", "vit_relpos_base_patch16_224", "vit_srelpos_small_patch16_224",
    ],
    "stages": ["swin_tiny_patch4_window7_224", "hiera_tiny_224", "sam2_hiera_tiny", "swinv2_tiny_window8_256"],
    "bias of queries": [
        "eva_giant_patch14_224", "eva02_enormous_patch14_clip_224", "vit_small_patch16_dinov3_qkvb",
        "vit_medium_patch16_rope_reg1_gap_256",
    ],
    "one another|beside the MLP": ["vit_small_patch16_18x2_224", "vit_base_patch16_xp_224"],
    "after attention": ["vit_base_patch16_rpn_224"],
    "attention": ["vit_dwee_patch16_reg1_gap_256", "cait_xxs24_224", "convit_tiny", "xcit_nano_12_p16_224"],
    "several sizes": ["naflexvit_base_patch16_gap"],
}  # fmt: skip
HAVE_NO_DEPTH = ("xcit", "swin", "sam2", "hiera")


@pytest.mark.parametrize(("lacks", "name"), [(lacks, name) for lacks, names in REFUSED.items() for name in names])
def test_model_that_cannot_be_held_is_taken_for_a_vit(lacks, name):
    """Its bare weights, some of which have the names and shapes of another model's."""
    with torch.device("meta"):
        theirs = timm.create_model(name, **{} if name.startswith(HAVE_NO_DEPTH) else {"depth": 1})
    state = {key: torch.zeros(()).expand(value.shape) for key, value in theirs.state_dict().items()}
    with pytest.raises(NotImplementedError, match=rf"ViTConfig does not have .*({lacks})"):
        vitfast.load(state)


TINY = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8
)
HUGGING_FACE = {
    "DINOv3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY)),
    "BEiT": lambda: transformers.BeitModel(transformers.BeitConfig(**TINY, use_relative_position_bias=True)),
    "Swin": lambda: transformers.SwinModel(
        transformers.SwinConfig(embed_dim=16, depths=[1], num_heads=[2], image_size=32)
    ),
    "SAM": lambda: transformers.VitDetModel(transformers.VitDetConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        use_relative_position_embeddings=True,
    )),
}  # fmt: skip


@pytest.mark.parametrize("whose", HUGGING_FACE)
@pytest.mark.parametrize("where", ["memory", "disk"])
def test_model_of_hugging_face_that_cannot_be_held_is_not_named(whose, where, tmp_path):
    theirs = HUGGING_FACE[whose]()
    theirs.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=rf"these are weights of .*{whose}"):
        vitfast.load(theirs if where == "memory" else tmp_path)


def test_own_model_without_norms_is_taken_for_somebodys():
    """What the config says wins over what is missing."""
    config = vitfast.ViTConfig(
        image_size=32, patch_size=16, dim=48, heads=3, depth=1, class_token=False, final_norm=False, pool="mean"
    )
    own = vitfast.ViT.from_config(config).eval()
    assert refused(own.state_dict(), told=False) is not None
    assert vitfast.load(own).config == config
    with pytest.raises(NotImplementedError, match="as_='timm' reads them"):
        vitfast.load(own.state_dict())
    assert torch.equal(vitfast.load(own.state_dict(), as_="timm", heads=3).pos_embed, own.pos_embed)
