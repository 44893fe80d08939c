"""Towers of CLIP and SigLIP under OpenAI's and open_clip's names, and what is written of towers for others."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from test_layouts_clip import HUGGING_FACE, assert_close, clip, described, filled, siglip
from timm.models.vision_transformer import checkpoint_filter_fn

import vitfast
from vitfast.loading.recognise import recognise
from vitfast.timm_names.variants import config_for
from vitfast.weights.layouts.layout import Facts, NeedsArgument, written

LISTS = Path(__file__).parent / "layouts"

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


def tower_output(state, images, activation, heads, prefix="visual."):
    """OpenAI's vision tower (Radford et al., 2021, sections 2.4 and 3.1.1), by the names of its weights."""
    w = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    norm = lambda x, name: F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)  # noqa: E731
    linear = lambda x, name: x @ w[f"{name}.weight"].T + w[f"{name}.bias"]  # noqa: E731
    patches = F.conv2d(images, w["conv1.weight"], stride=w["conv1.weight"].shape[2:]).flatten(2).mT
    x = torch.cat([w["class_embedding"].expand(len(images), 1, -1), patches], 1) + w["positional_embedding"]
    x = norm(x, "ln_pre") if "ln_pre.weight" in w else x
    for i in range(sum(name.endswith("ln_1.weight") for name in w)):
        block = f"transformer.resblocks.{i}"
        qkv = norm(x, f"{block}.ln_1") @ w[f"{block}.attn.in_proj_weight"].T + w[f"{block}.attn.in_proj_bias"]
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
        branch = linear(mixed.transpose(1, 2).flatten(2), f"{block}.attn.out_proj")
        x = x + branch * w.get(f"{block}.ls_1.gamma", 1)
        hidden = linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
        hidden = ACTIVATIONS[activation](hidden)
        x = x + linear(hidden, f"{block}.mlp.c_proj") * w.get(f"{block}.ls_2.gamma", 1)
    # CLIPA has no first norm, and pools the patches
    pooled = x[:, 0] if "ln_pre.weight" in w else x[:, 1:].mean(1)
    return norm(pooled, "ln_post") @ w["proj"]


def openai(dim=96, depth=2, patch=8, side=4, mlp=384, out=24, without=(), more=(), archive=False):
    """A state dict with OpenAI's names, drawn; the text tower has one block."""
    shapes = {
        "visual.class_embedding": [dim], "visual.positional_embedding": [side * side + 1, dim],
        "visual.proj": [dim, out], "visual.conv1.weight": [dim, 3, patch, patch],
        "visual.ln_pre.weight": [dim], "visual.ln_pre.bias": [dim],
        "visual.ln_post.weight": [dim], "visual.ln_post.bias": [dim],
        "positional_embedding": [8, 32], "text_projection": [32, out], "token_embedding.weight": [40, 32],
        "ln_final.weight": [32], "ln_final.bias": [32], "logit_scale": [],
    }  # fmt: skip
    blocks = [(f"visual.transformer.resblocks.{i}.", dim, mlp) for i in range(depth)]
    for prefix, width, inner in [*blocks, ("transformer.resblocks.0.", 32, 128)]:
        shapes |= {prefix + name: shape for name, shape in {
            "ln_1.weight": [width], "ln_1.bias": [width], "attn.in_proj_weight": [3 * width, width],
            "attn.in_proj_bias": [3 * width], "attn.out_proj.weight": [width, width], "attn.out_proj.bias": [width],
            "ln_2.weight": [width], "ln_2.bias": [width], "mlp.c_fc.weight": [inner, width],
            "mlp.c_fc.bias": [inner], "mlp.c_proj.weight": [width, inner], "mlp.c_proj.bias": [width],
        }.items()}  # fmt: skip
    if "ls" in more:
        shapes |= {
            f"visual.transformer.resblocks.{i}.ls_{j}.gamma": [dim] for i in range(depth) for j in (1, 2)
        }  # fmt: skip
    state = {name: torch.randn(shape) for name, shape in shapes.items() if not name.startswith(tuple(without))}
    for name, weight in state.items():
        if weight.dim() == 1 and name.endswith(("weight", "gamma")):
            weight.mul_(0.3).exp_()
        else:
            weight.mul_(0.3 if weight.dim() < 2 else 1.5 * weight[0].numel() ** -0.5)
    numbers = {"input_resolution": side * patch, "context_length": 8, "vocab_size": 40}
    return state | ({name: torch.tensor(n) for name, n in numbers.items()} if archive else {})


CONFIG = {
    "embed_dim": 24, "text_cfg": {},
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 96, "head_width": 32, "patch_size": 8},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(
    ("how", "vision", "activation"),
    [
        ({}, {}, "gelu"),
        ({}, {}, "quick_gelu"),
        ({"more": ("ls",)}, {"ls_init_value": 1e-4}, "gelu"),
        ({"without": ("visual.ln_pre.",)},
         {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True}, "gelu"),
        ({}, {"act_kwargs": {"approximate": "tanh"}}, "gelu_tanh"),
    ],
    ids=["erf", "quick", "LayerScale", "CLIPA", "tanh"],
)  # fmt: skip
@pytest.mark.parametrize("told", ["config", "arguments"])
def test_a_tower_of_open_clip_is_read_as_another(how, vision, activation, told, tmp_path):
    """From a folder with its config, and from bare weights with what they do not tell."""
    state = {name: weight.double() for name, weight in openai(**how).items()}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    given = {"heads": 3, "activation": activation}
    if told == "config":
        model = CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | vision, "quick_gelu": activation == "quick_gelu"}
        images = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "resize_mode": "squash"}
        config = {"model_cfg": model, "preprocess_cfg": images}
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        given = {}
    ours = vitfast.load(tmp_path, dtype=torch.float64, **given)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(ours(images), tower_output(state, images, activation, 3))
    assert "passed over 17 of the text tower" in str(ours.load_report)
    if told == "arguments":
        clipa = ours.config.pool == "mean"
        assert ours.pretrained_cfg["mean"] == ((0.485, 0.456, 0.406) if clipa else (0.48145466, 0.4578275, 0.40821073))
        assert ours.pretrained_cfg["crop_mode"] == ("squash" if clipa else "center")
    else:
        assert not ours.load_report.assumed
        assert ours.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and ours.pretrained_cfg["crop_mode"] == "squash"


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 48, 16])
def test_openais_weights_differ_from_timms_conversion(size):
    """Each weight, the projection's zero bias and positions of another size, bit for bit; the tokens and outputs."""
    state = openai()
    theirs = timm.create_model(
        "vit_base_patch16_clip_quickgelu_224",
        img_size=size, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=24,
    ).eval()  # fmt: skip
    theirs.load_state_dict(checkpoint_filter_fn(dict(state), theirs))
    ours = vitfast.load(state, heads=3, activation="quick_gelu", image_size=size)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight), name
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    assert_close(ours.double()(images), theirs.double()(images))
    assert_close(ours.forward_features(images), theirs.forward_features(images))


@torch.no_grad()
def test_heads_of_the_largest_of_open_clip_have_64_channels():
    """ViT-e has 16 of 112, which no config beside the weights has to say."""
    with torch.device("meta"):
        state = openai(dim=1792, depth=56, mlp=15360)
    _, config, _, known = described(state, given={"activation": "gelu"})
    assert config.heads == 16 and known.assumed["heads"] == "as open_clip has it"


def test_numbers_of_openais_archive_do_not_tell_whose_it_is():
    """They are quick GELU and heads of 64 channels; without them either has to be said."""
    state = openai(dim=128, archive=True)
    ours = vitfast.load(state, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    assert_close(ours(images), tower_output({k: v.double() for k, v in state.items()}, images, "quick_gelu", heads=2))
    assert not {"activation", "heads"} & set(ours.load_report.assumed)
    assert ours.pretrained_cfg["mean"] == (0.48145466, 0.4578275, 0.40821073)
    bare = {name: weight for name, weight in state.items() if name.startswith("visual.")}
    with pytest.raises(NeedsArgument, match="activation must be given.*OpenAI's CLIP has quick_gelu"):
        vitfast.load(bare)


def test_a_tower_alone_or_in_half_precision_is_refused():
    """`visual.state_dict()`, and OpenAI's own fp16 with norms in fp32."""
    whole = openai()
    alone = {name.removeprefix("visual."): w for name, w in whole.items() if name.startswith("visual.")}
    alone = {name: w.half() if w.dim() > 1 else w for name, w in alone.items()}
    ours = vitfast.load(alone, heads=3, activation="quick_gelu")
    assert torch.equal(ours.head.weight, whole["visual.proj"].half().float().T)
    assert not ours.load_report.ignored


def published(name):
    content = json.loads((LISTS / f"{name}.json").read_text())
    assert content["source"].startswith("https://github.com/")
    return {key: torch.empty(shape, device="meta") for key, shape in content["keys"].items()}


# list of names -> (layout, what has to be given, what it is in timm's names, weights of no use)
PUBLISHED = {
    "openai_clip_vit_b_32": (
        "openai-clip", {}, config_for("vit_base_patch32_clip_quickgelu_224"), {"the text tower": 149},
    ),
    "open_clip_vit_m_16_alt": (
        "openai-clip", {"activation": "gelu"},
        config_for("vit_medium_patch16_clip_224").replace(depth=2, layer_scale=1e-5, num_classes=384),
        {"the text tower": 29},
    ),
    "open_clip_vit_l_14_clipa": (
        "openai-clip", {},
        config_for("vit_large_patch14_224").replace(depth=2, pool="mean", norm_eps=1e-5, num_classes=768),
        {"the text tower": 29},
    ),
    "open_clip_vit_b_16_siglip": (
        "open_clip-timm", {}, config_for("vit_base_patch16_siglip_224"), {"the text tower": 150},
    ),
    "open_clip_vit_medium_patch16_gap_256": (
        "open_clip-timm-linear", {},
        config_for("vit_medium_patch16_gap_256").replace(depth=2, num_classes=512), {"the text tower": 29},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_not_recognised_or_in_part(name):
    """The lists that are committed: each name is read or known to be of no use."""
    layout, given, expected, ignored = PUBLISHED[name]
    found, config, sources, known = described(published(name), given=given)
    assert found == layout
    squashed = "siglip" in name or "clipa" in name
    assert "gap" in name or (known.preprocessing["crop_mode"] == "squash") == squashed
    alike = expected.replace(norm_after_pool=config.norm_after_pool, layer_scale=config.layer_scale)
    assert config == alike and (config.layer_scale is None) == (expected.layer_scale is None)
    counts = {what: list(sources.ignored.values()).count(what) for what in ignored}
    assert counts == ignored, sorted(sources.ignored)


REFUSED = {
    "openai_clip_rn50_visual": "CLIP with a ResNet.*convolutions",
    "open_clip_coca_vit_b_32": "CoCa.*pooling",
    "open_clip_eva02_b_16": "EVA-02.*rotary",
    "open_clip_pe_core_b_16": "Perception Encoder.*rotary",
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tower_that_no_config_describes_is_read_or_not_named(name):
    with pytest.raises(NotImplementedError, match=REFUSED[name]):
        described(published(name))


def test_a_model_of_ours_is_taken_for_one_that_is_refused(tmp_path):
    """Its file says that it has no rotary positions, as the Perception Encoder has beside the same names."""
    config = vitfast.ViTConfig(image_size=32, patch_size=8, dim=64, depth=1, heads=2, pre_norm=True, pool="map")
    model = vitfast.ViT.from_config(config)
    vitfast.save_checkpoint(model, tmp_path / "m.safetensors")
    ours = vitfast.load(tmp_path / "m.safetensors")
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in ours.state_dict().items())
    with pytest.raises(NotImplementedError, match="Perception Encoder"):
        vitfast.load(model.state_dict())


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"visual.transformer.resblocks.0.attn.ln_q.weight": [32]}, r"custom blocks \(attn.ln_q\)"),
        ({"visual.transformer.resblocks.0.attn.head_scale": [3, 1, 1]}, r"custom blocks \(attn.head_scale\)"),
        ({"visual.transformer.resblocks.0.ln_attn.weight": [96]}, r"custom blocks \(ln_attn\)"),
        ({"visual.transformer.resblocks.0.mlp.ln.weight": [384]}, r"custom blocks \(mlp.ln\)"),
    ],
)
def test_custom_blocks_of_open_clip_are_read_as_plain_ones(more, said):
    with pytest.raises(NotImplementedError, match=said):
        described(openai() | {name: torch.empty(shape) for name, shape in more.items()})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("visual.head.mlp.fc1.weight", r"only visual\.head\.proj\.weight is supported.*head\.mlp"),
        ("visual.head.proj.bias", r"only visual\.head\.proj\.weight is supported.*head\.proj\.bias"),
        ("visual.trunk.embeds.proj.weight", "NaFlexViT"),
        ("visual.trunk.blocks.0.attn.q_bias", "EVA or BEiT"),
    ],
)
def test_a_trunk_with_another_head_or_blocks_is_read_as_a_plain_one(name, said):
    state = published("open_clip_vit_medium_patch16_gap_256") | {name: torch.empty(3)}
    with pytest.raises(NotImplementedError, match=said):
        described(state)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "own", "head", "pool"),
    [
        ("vit_base_patch16_siglip_224", {"num_classes": 0}, 0, "map"),
        ("vit_medium_patch16_gap_256", {"num_classes": 0}, 24, ""),
        ("vit_base_patch16_224", {"num_classes": 0}, 24, "avg"),
        ("vit_base_patch16_224", {"num_classes": 24, "global_pool": "avg"}, 0, "avg"),
        ("vit_base_patch32_clip_224", {"num_classes": 24}, 0, "token"),
    ],
)
def test_a_model_of_timm_in_open_clip_is_read_as_another(name, own, head, pool, tmp_path):
    """The projection beside it or its own; which model it is says the config."""
    small = {"img_size": 64, "embed_dim": 96, "depth": 2, "num_heads": 3}
    theirs = timm.create_model(name, **small, **own)
    if head and pool:
        # as open_clip makes it, so that the norm stays before the mean
        theirs.reset_classifier(0, global_pool=pool)
    theirs = filled(theirs).double()
    state = {f"visual.trunk.{key}": weight for key, weight in theirs.state_dict().items()}
    state |= {
        "text.token_embedding.weight": torch.ones(3, 2),
        "logit_scale": torch.ones(()),
        "logit_bias": torch.ones(1),
    }
    projection = torch.randn(24, 96, dtype=torch.float64) if head else None
    state |= {"visual.head.proj.weight": projection} if head else {}
    save_file(state, tmp_path / "open_clip_model.safetensors")
    vision = {"timm_model_name": name, "timm_model_kwargs": small, "image_size": 64, "timm_pool": pool}
    config = {"model_cfg": {"vision_cfg": vision}, "preprocess_cfg": {"resize_mode": "squash"}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    ours = vitfast.load(tmp_path, dtype=torch.float64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = theirs(images)
    assert_close(ours(images), expected @ projection.T if head else expected)
    assert set(ours.load_report.ignored.values()) == {
        "the text tower",
        "scale and shift of the similarity of images and texts",
    }
    assert ours.pretrained_cfg["crop_mode"] == "squash"


# writing


WRITTEN = {
    "hf-clip": lambda: clip(transformers.CLIPVisionModelWithProjection),
    "hf-clip classifier": lambda: clip(transformers.CLIPForImageClassification, num_labels=5),
    "hf-siglip": lambda: siglip(transformers.SiglipVisionModel),
    "hf-siglip classifier": lambda: siglip(transformers.SiglipForImageClassification, num_labels=5),
}


def layout_and_view(state, facts):
    found = recognise(state, facts)
    return found.layout, dict(found.view)


@pytest.mark.parametrize("name", WRITTEN)
def test_what_is_written_is_not_what_hugging_face_had(name):
    """Bit for bit, under its names; the joint projection of the pooling head is made of two of ours."""
    theirs = filled(WRITTEN[name]())
    layout, view = layout_and_view(theirs.state_dict(), Facts())
    ours = vitfast.load(theirs)
    state = written(layout, ours.state_dict(), ours.config)
    unread = {key for key in view if key not in state}
    assert unread <= ours.load_report.ignored.keys()
    for key, weight in state.items():
        assert torch.equal(weight, view[key]), key


@pytest.mark.parametrize("how", [{}, {"more": ("ls",)}, {"without": ("visual.ln_pre.",)}])
def test_what_is_written_is_not_what_openai_had(how):
    theirs = openai(**how)
    layout, view = layout_and_view(theirs, Facts())
    ours = vitfast.load(theirs, heads=3, activation="gelu")
    state = written(layout, ours.state_dict(), ours.config)
    assert {f"visual.{key}" for key in state} == {key for key in theirs if key.startswith("visual.")}
    for key, weight in state.items():
        assert torch.equal(weight, view[key]), key


@torch.no_grad()
@pytest.mark.parametrize("name", ["CLIP", "CLIP erf", "CLIP projected", "SigLIP", "SigLIP erf"])
def test_a_tower_written_for_transformers_computes_something_else(name, tmp_path):
    """`from_pretrained` reads it as what it was."""
    build, output = HUGGING_FACE[name]
    theirs = filled(build())
    vitfast.convert(theirs, tmp_path / "hf", to="hf")
    again = type(theirs).from_pretrained(tmp_path / "hf")
    for key, weight in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight), key
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(output(again.eval(), images), output(theirs, images))


@torch.no_grad()
def test_openais_weights_written_for_transformers_compute_something_else(tmp_path):
    state = openai(dim=128, archive=True)
    vitfast.convert(state, tmp_path / "hf", to="hf")
    theirs = transformers.CLIPVisionModelWithProjection.from_pretrained(tmp_path / "hf", dtype=torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = tower_output({k: v.double() for k, v in state.items()}, images, "quick_gelu", heads=2)
    assert_close(theirs(images).image_embeds, expected)


def test_a_bias_that_clip_does_not_have_is_lost():
    ours = vitfast.load(openai(), heads=3, activation="gelu")
    layout, _ = layout_and_view(openai(), Facts())
    with torch.no_grad():
        ours.head.bias[0] = 1
    with pytest.raises(NotImplementedError, match="no place for head.bias, which must be zero"):
        written(layout, ours.state_dict(), ours.config)
