"""timm's names and keywords mean for vitfast what they mean for timm."""

import inspect
import sys

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vitfast
from vitfast import UNSUPPORTED, VARIANTS, ViTConfig, config_for, create_model, list_models

TINY = "vit_tiny_patch16_224"
POOLS = {"token": "token", "mean": "avg", "map": "map", "none": ""}
NORMS = {"layer": timm.layers.LayerNorm, "rms": timm.layers.RmsNorm}
ACTIVATIONS = {
    "gelu": (nn.GELU, timm.layers.GELU),
    "gelu_tanh": timm.layers.GELUTanh,
    "quick_gelu": timm.layers.QuickGELU,
    "silu": nn.SiLU,
}
MLPS = {"mlp": timm.layers.Mlp, "swiglu_packed": timm.layers.GluMlp, "swiglu": timm.layers.SwiGLU}


class Stop(Exception):
    pass


@pytest.fixture(scope="session")
def registry():
    """timm's names of the plain and the distilled VisionTransformer -> (class name, constructor keywords)."""
    calls = []

    def capture(cls, variant, pretrained, **keywords):
        calls.append((cls.__name__, keywords))
        raise Stop

    names = {}
    with pytest.MonkeyPatch.context() as patch, torch.device("meta"):
        for path, module in list(sys.modules.items()):
            if path.startswith("timm.models.") and hasattr(module, "build_model_with_cfg"):
                patch.setattr(module, "build_model_with_cfg", capture)
        for name in timm.list_models():
            calls.clear()
            # some entry points build a stem of their own first, which can fail without a real device
            try:
                timm.create_model(name)
            except Exception:
                if calls and calls[0][0] in ("VisionTransformer", "VisionTransformerDistilled"):
                    names[name] = calls[0]
    return names


def same_model(name, **keywords):
    """Build both models on the meta device and compare everything that an architecture consists of."""
    with torch.device("meta"):
        theirs = timm.create_model(name, **keywords)
    ours = create_model(name, device="meta", **keywords)
    shapes = lambda model: [(key, tuple(value.shape)) for key, value in model.state_dict().items()]  # noqa: E731
    assert shapes(ours) == shapes(theirs)

    c = ours.config
    assert c.image_size == theirs.patch_embed.img_size
    assert c.patch_size == theirs.patch_embed.patch_size
    assert c.grid_size == theirs.patch_embed.grid_size
    assert c.num_classes == theirs.num_classes
    assert c.channels == theirs.in_chans
    assert POOLS[c.pool] == theirs.global_pool
    assert c.pool_prefix == theirs.pool_include_prefix
    assert c.dynamic_image_size == theirs.dynamic_img_size
    assert c.dynamic_pad == theirs.patch_embed.dynamic_img_pad
    assert c.num_prefix_tokens == theirs.num_prefix_tokens
    if c.num_prefix_tokens and c.pos_embed != "none":
        assert (c.pos_embed == "patches") == theirs.no_embed_class
    assert c.head_dropout == theirs.head_drop.p
    assert c.emb_dropout == theirs.pos_drop.p

    block = theirs.blocks[-1]
    assert (c.heads, c.head_dim) == (block.attn.num_heads, block.attn.head_dim)
    assert c.attn_dropout == block.attn.attn_drop.p
    assert c.proj_dropout == block.attn.proj_drop.p
    assert c.mlp_dropout == block.mlp.drop1.p == block.mlp.drop2.p
    assert c.drop_path == getattr(block.drop_path1, "drop_prob", 0.0)
    assert c.layer_scale == getattr(block.ls1, "init_values", None)
    assert isinstance(block.mlp, MLPS[c.mlp])
    assert isinstance(block.mlp.act, ACTIVATIONS[c.activation])
    if theirs.attn_pool is not None:
        assert isinstance(theirs.attn_pool.mlp.act, ACTIVATIONS[c.activation])
    kinds = tuple(NORMS.values())
    norms = [module for module in theirs.modules() if isinstance(module, kinds)]
    assert {type(norm) for norm in norms} == {NORMS[c.norm]}
    assert {norm.eps for norm in norms} == {c.norm_eps}
    return c


def test_tables_are_timms_registry(registry):
    # a name that a timm upgrade adds, drops or moves to another class
    assert not VARIANTS.keys() & UNSUPPORTED.keys()
    assert VARIANTS.keys() | UNSUPPORTED.keys() == registry.keys()
    plain = [name for name in VARIANTS if registry[name][0] == "VisionTransformer"]
    assert len(plain) >= 160
    assert len(VARIANTS) - len(plain) == 4


def test_tables_hold_only_what_differs():
    # a field that repeats a default hides what is particular about a variant
    for name, fields in VARIANTS.items():
        default = ViTConfig()
        assert {field: value for field, value in fields.items() if value == getattr(ViTConfig, field)} == {}, name
        assert fields.get("mlp_dim") != 4 * fields.get("dim", default.dim), name


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_variant_is_timms(name, registry):
    # a wrong cell of the table, whether or not it shows in a parameter's shape; depth by itself, for time
    default = inspect.signature(VisionTransformer).parameters["depth"].default
    assert config_for(name).depth == registry[name][1].get("depth", default)
    config = same_model(name, depth=2)
    assert config.replace(depth=config_for(name).depth) == config_for(name)


def test_unsupported_really_lacks_the_field(registry):
    # a name that is kept out by mistake
    defaults = {key: parameter.default for key, parameter in inspect.signature(VisionTransformer).parameters.items()}
    for name, text in UNSUPPORTED.items():
        keywords = registry[name][1]
        shown = {key: getattr(value, "func", value) for key, value in keywords.items()}
        shown = {key: getattr(value, "__name__", repr(value)) for key, value in shown.items()}
        odd = [key for key in ("embed_layer", "mlp_layer", "block_fn", "attn_layer") if key in keywords]
        if not odd:
            assert 384 % keywords["patch_size"], name
            assert text.startswith(f"img_size=384 with patch_size={keywords['patch_size']}"), name
        else:
            assert text == " and ".join(f"{key}={shown[key]}" for key in sorted(odd)), name
            assert all(keywords[key] != defaults[key] for key in odd), name


@pytest.mark.parametrize(
    "keywords",
    [
        {"global_pool": "avg"},
        {"global_pool": "avg", "fc_norm": False},
        {"global_pool": "avg", "class_token": False},
        {"global_pool": "avg", "pool_include_prefix": True},
        {"global_pool": "map"},
        {"global_pool": "map", "mlp_ratio": 3.5, "act_layer": "gelu_tanh"},
        {"global_pool": ""},
        {"fc_norm": True},
        {"reg_tokens": 4},
        {"reg_tokens": 4, "no_embed_class": True},
        {"reg_tokens": 2, "class_token": False, "global_pool": "avg"},
        {"no_embed_class": True},
        {"pos_embed": "none"},
        {"pos_embed": "", "no_embed_class": True},
        {"pos_embed": "learn", "no_embed_class": True},
        {"init_values": 1e-5},
        {"init_values": 0.0},
        {"qk_norm": True},
        {"qk_norm": True, "norm_layer": "rmsnorm"},
        {"scale_attn_norm": True, "scale_mlp_norm": True},
        {"qkv_bias": False, "proj_bias": False},
        {"mlp_ratio": 3.0},
        {"mlp_ratio": 2.6667},
        {"embed_dim": 96, "num_heads": 2},
        {"img_size": (96, 128)},
        {"img_size": 64, "patch_size": 8},
        {"img_size": 56, "patch_size": (14, 28)},
        {"in_chans": 1},
        {"num_classes": 0},
        {"num_classes": 7},
        {"pre_norm": True},
        {"final_norm": False},
        {"final_norm": False, "global_pool": "avg"},
        {"dynamic_img_size": True},
        {"dynamic_img_size": True, "dynamic_img_pad": True, "img_size": 100},
        {"norm_layer": "LayerNorm"},
        {"norm_layer": "rms_norm"},
        {"embed_norm_layer": "layernorm"},
        {"embed_norm_layer": "rmsnorm", "norm_layer": "rmsnorm"},
        {"act_layer": "silu"},
        {"act_layer": "quick_gelu"},
        {"act_layer": ""},
        {"drop_rate": 0.1, "pos_drop_rate": 0.2, "proj_drop_rate": 0.3, "attn_drop_rate": 0.4, "drop_path_rate": 0.5},
        {"patch_drop_rate": 0.0, "weight_init": "", "fix_init": False, "attn_layer": "attn", "scriptable": False},
        {"num_classes": None, "global_pool": None, "drop_path_rate": None, "init_values": None, "fc_norm": None},
    ],
    ids=lambda keywords: ",".join(f"{key}={value}" for key, value in keywords.items()),
)
def test_keyword_is_timms(keywords):
    # a keyword that lands in the wrong field, or is dropped
    same_model(TINY, **{"depth": 2} | keywords)


@pytest.mark.parametrize(
    ("name", "keywords"),
    [
        # the place of the final norm follows the pool unless the variant fixes it
        ("vit_base_patch16_siglip_224", {"global_pool": "avg"}),
        ("vit_base_patch16_siglip_gap_224", {"global_pool": "map"}),
        ("vit_medium_patch16_reg4_gap_256", {"global_pool": "map"}),
        ("eva_large_patch14_196", {"global_pool": "token"}),
        ("beit3_base_patch16_224", {"global_pool": ""}),
        # the MLP's width follows the ratio that timm wrote down, not the variant's own width
        ("vit_so400m_patch14_siglip_224", {"embed_dim": 5120}),
        ("vit_so400m_patch14_reg1_tipsv2", {"embed_dim": 5120}),
        ("vit_giant_patch14_dinov2", {"embed_dim": 768}),
        ("vit_giant_patch14_clip_224", {"embed_dim": 704}),
        ("aimv2_3b_patch14_224", {"embed_dim": 768}),
        ("vit_wee_patch16_reg1_gap_256", {"mlp_ratio": 4}),
        # what the variant turned on can be turned off
        ("deit3_small_patch16_224", {"no_embed_class": False, "init_values": 0}),
        ("vit_base_patch14_reg4_dinov2", {"no_embed_class": False, "pos_embed": "learn"}),
        ("vit_base_patch14_reg4_dinov2", {"reg_tokens": 0}),
        ("vit_intern300m_patch14_448", {"dynamic_img_size": False, "final_norm": True}),
        ("vit_base_patch16_clip_224", {"pre_norm": False}),
        ("aimv2_large_patch14_224", {"embed_norm_layer": ""}),
        ("aimv2_large_patch14_224", {"embed_norm_layer": "layernorm", "norm_layer": "layernorm"}),
        # a norm by name brings its own eps
        ("vit_base_patch16_clip_224", {"norm_layer": "layernorm"}),
        ("vit_base_patch16_clip_quickgelu_224", {"act_layer": "gelu", "norm_layer": "rmsnorm"}),
        ("test_vit3", {"norm_layer": "rmsnorm"}),
        ("vit_giant_patch14_dinov2", {"act_layer": "gelu"}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 7, "img_size": 192}),
        ("deit_tiny_distilled_patch16_224", {"num_classes": 0, "init_values": 1e-4}),
    ],
)
def test_keyword_against_the_variants_own(name, keywords):
    # a default that was resolved before the caller's keyword
    same_model(name, depth=2, **keywords)


@pytest.mark.parametrize(
    ("error", "said", "name", "keywords"),
    [
        (ValueError, ["'vit_tiny_patch16_225'", TINY], "vit_tiny_patch16_225", {}),
        (ValueError, ["nothing is close"], "§", {}),
        (ValueError, ["augreg_in1k", "drop the tag", "checkpoint_path"], "vit_base_patch16_224.augreg_in1k", {}),
        (ValueError, ["downloads nothing", "checkpoint_path"], "hf-hub:timm/vit_base_patch16_224.augreg_in1k", {}),
        (TypeError, ["name must be a str"], None, {}),
        (NotImplementedError, ["embed_layer=HybridEmbed"], "vit_base_r50_s16_224", {}),
        (NotImplementedError, ["embed_layer=HybridEmbed"], "vit_base_r50_s16_384.orig_in21k_ft_in1k", {}),
        (NotImplementedError, ["attn_layer='diff'"], "vit_dwee_patch16_reg1_gap_256", {"depth": 2}),
        (NotImplementedError, ["pretrained", "checkpoint_path"], TINY, {"pretrained": True}),
        (TypeError, ["'image_size'", "img_size"], TINY, {"image_size": 224}),
        (TypeError, ["'heads'", "num_heads"], TINY, {"heads": 3}),
        (TypeError, ["mlp_ratio", "'4'"], TINY, {"mlp_ratio": "4"}),
        (TypeError, ["embed_dim", "'192'"], TINY, {"embed_dim": "192"}),
        (NotImplementedError, ["patch_drop_rate=0.25"], TINY, {"patch_drop_rate": 0.25}),
        (NotImplementedError, ["fix_init=True"], TINY, {"fix_init": True}),
        (NotImplementedError, ["weight_init='jax'"], TINY, {"weight_init": "jax"}),
        (NotImplementedError, ["attn_layer='diff'"], TINY, {"attn_layer": "diff"}),
        (NotImplementedError, ["mlp_layer=", "SwiGLU"], TINY, {"mlp_layer": timm.layers.SwiGLU}),
        (NotImplementedError, ["block_fn="], TINY, {"block_fn": nn.Identity}),
        (NotImplementedError, ["embed_layer="], TINY, {"embed_layer": nn.Identity}),
        (NotImplementedError, ["global_pool='avgmax'", "'avg'"], TINY, {"global_pool": "avgmax"}),
        (NotImplementedError, ["pos_embed='rope'"], TINY, {"pos_embed": "rope"}),
        (NotImplementedError, ["norm_layer='batchnorm2d'"], TINY, {"norm_layer": "batchnorm2d"}),
        (NotImplementedError, ["act_layer=", "ReLU"], TINY, {"act_layer": nn.ReLU}),
        (NotImplementedError, ["embed_norm_layer", "norm_layer"], "aimv2_1b_patch14_224", {"norm_layer": "layernorm"}),
        (ValueError, ["pool", "class_token"], TINY, {"class_token": False}),
        (ValueError, ["image_size", "225"], TINY, {"img_size": 225}),
    ],
)
def test_errors_name_the_cause(error, said, name, keywords):
    # a wrong name or keyword that is ignored, or whose error does not say what to change
    with pytest.raises(error) as raised:
        create_model(name, device="meta", **keywords)
    for words in said:
        assert words in str(raised.value)


def test_unsupported_names_raise_with_their_field():
    # a name in the table that builds something else instead
    for name, field in UNSUPPORTED.items():
        with pytest.raises(NotImplementedError) as raised:
            config_for(name)
        assert name in str(raised.value)
        assert field in str(raised.value)


def test_list_models():
    # a filter that is matched as a substring, or names that create_model refuses
    assert list_models() == sorted(VARIANTS)
    assert list_models("deit_*distilled*") == [name for name in sorted(VARIANTS) if "distilled" in name]
    assert list_models("vit_tiny") == []


def test_device_and_dtype():
    # parameters or buffers left behind in another dtype or on another device
    for device in ("meta", torch.device("cpu")):
        model = create_model("test_vit", depth=1, device=device, dtype=torch.bfloat16)
        assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.bfloat16}
        assert {tensor.device.type for tensor in model.state_dict().values()} == {torch.device(device).type}


def test_checkpoint_path(tmp_path):
    # a path that is accepted and not read
    saved = create_model("test_vit3", depth=1, num_classes=5)
    vitfast.save_checkpoint(saved, tmp_path / "weights.safetensors")
    loaded = create_model("test_vit3", depth=1, num_classes=5, checkpoint_path=tmp_path / "weights.safetensors")
    for key, value in saved.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[key]), key
