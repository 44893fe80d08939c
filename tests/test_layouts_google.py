"""Google's npz files: read as another model than flax computes, or not under all names that they were published with.

google_outputs.json has what Google's own code gives, by flax, for weights that are drawn here again.
"""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm_pair import make_trained_like

import vitfast
from vitfast.loading.recognise import recognise
from vitfast.model.vit import ViT
from vitfast.timm_names.variants import config_for
from vitfast.weights.layouts.google import LAYOUTS
from vitfast.weights.layouts.layout import Facts, sources_of, written
from vitfast.weights.names import own_weights

LISTS = Path(__file__).parent / "layouts"
CASES = json.loads((LISTS / "google_outputs.json").read_text())["cases"]
SINCOS = [name for name in CASES if "sincos2d" in name]


def drawn(shapes):
    """Weights as trained ones are: gains around one, biases, sharp attention. Flax was given the same."""
    numbers, weights = np.random.default_rng(0), {}
    for name in sorted(shapes):
        shape = shapes[name]
        z = numbers.standard_normal(shape)
        if name.endswith("scale"):
            z = np.exp(0.3 * z)
        elif name.endswith("bias"):
            z = 0.3 * z
        elif name.endswith("kernel"):
            heads_last = name.split("/")[-2] in ("query", "key", "value")
            z = 1.5 * z / math.sqrt(shape[-3] if heads_last else math.prod(shape[:-1]))
        else:
            z = 0.5 * z
        weights[name] = z.astype(np.float32)
    return weights


def images_of(size):
    x = np.random.default_rng(1).standard_normal((2, size, size, 3)).astype(np.float32)
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def case(name):
    return {key: torch.from_numpy(value) for key, value in drawn(CASES[name]["keys"]).items()}


def options(name, size=32):
    """What no weights tell of a case."""
    how = {"pool": "none"} if "none" in name else {}
    return how | ({"image_size": size} if size != 32 or name in SINCOS else {})


def flax_differs(model, name, size):
    expected = torch.tensor(CASES[name]["outputs"][str(size)], dtype=torch.float64)
    with torch.no_grad():
        found = model(images_of(size).double())
    found = found.reshape(2, -1, found.shape[-1])[:, :3]
    assert found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize("name", CASES)
def test_a_model_computes_something_else_than_in_flax(name, size, tmp_path):
    """At the size of its positions, and at one for which Google's code resamples them."""
    np.savez(tmp_path / "x.npz", **drawn(CASES[name]["keys"]))
    model = vitfast.load(tmp_path / "x.npz", dtype=torch.float64, **options(name, size))
    # flax computed in fp32
    assert flax_differs(model, name, size) < 3e-6
    assert ("resampled as 'google'" in str(model.load_report)) == (size == 48 and name not in SINCOS)


@pytest.mark.parametrize(
    "change", [{"activation": "gelu"}, {"norm_eps": 1e-3}, {"resampling": "timm"}, {"resampling": "bilinear"}]
)
def test_what_flax_gave_does_not_tell_one_function_from_another(change):
    """The check above has to see what it is about."""
    model = vitfast.load(case("big_vision map"), dtype=torch.float64, image_size=48, **change)
    assert flax_differs(model, "big_vision map", 48) > 1e-5


def test_an_assumption_is_not_said():
    report = vitfast.load(case("big_vision gap")).load_report
    assert re.search("activation = 'gelu_tanh': flax.*tanh.*timm reads these with erf", str(report))
    assert report.assumed.keys() == {"activation", "norm_eps", "pool", "preprocessing"}
    assert report.preprocessing["mean"] == report.preprocessing["std"] == (0.5, 0.5, 0.5)
    assert report.preprocessing["interpolation"] == "bilinear"
    report = vitfast.load(case("big_vision gap"), activation="gelu", pool="none").load_report
    assert report.assumed.keys() == {"norm_eps", "preprocessing"}
    report = vitfast.load(case("big_vision gap sincos2d")).load_report
    assert report.assumed["pos_embed"].startswith("there are none") and "image_size" in report.assumed


# names of other releases


def before_linen(state):
    """Modules numbered together."""
    new = {"LayerNorm_1": "LayerNorm_2", "MultiHeadDotProductAttention_0": "MultiHeadDotProductAttention_1"}
    new["MlpBlock_0"] = "MlpBlock_3"
    return {
        re.sub("(?<=/)(LayerNorm_1|Multi.*_0|MlpBlock_0)(?=/)", lambda m: new[m[0]], name): value
        for name, value in state.items()
    }


def moved(old, new):
    return lambda state: {re.sub(old, new, name): value for name, value in state.items()}


def under(prefix, **beside):
    more = {name.replace("__", "/"): torch.ones(shape) for name, shape in beside.items()}
    return lambda state: {prefix + name: value for name, value in state.items()} | more


def beside_averages(state):
    """As training saves it: the optimizer's averages have the names of the weights."""
    others = {f"opt/0/{kind}/{name}": torch.ones_like(value) for kind in ("mu", "nu") for name, value in state.items()}
    more = {"opt/0/count": torch.ones(()), "chrono/accum_program_time": torch.ones(())}
    return others | {f"params/{name}": value for name, value in state.items()} | more


TEXT = {"params__txt__Encoder_0__encoder_norm__scale": [8], "params__txt__pos_embedding": [1, 4, 8]}
NAMES = {
    "before linen": ("big_vision tok", before_linen),
    "of today": ("vision_transformer token", moved("LayerNorm_2", "LayerNorm_1")),
    "positions in the encoder": ("big_vision gap", moved("^pos_embedding", "Transformer/pos_embedding")),
    "positions in a module": ("big_vision tok", moved("^pos_embedding", "Transformer/posembed_input/pos_embedding")),
    "inlined head": ("big_vision map", moved("^MAPHead_0/", "")),
    "flax's optimizer": ("big_vision tok", under("opt/target/", opt__state__step=[])),
    "optax": ("big_vision map", beside_averages),
    "params": ("big_vision map scan", under("params/")),
    "SigLIP": ("big_vision map", under("params/img/", params__t=[1], params__b=[1], **TEXT)),
    "LiT": ("vision_transformer token", under("img/", t=[1], txt__head__kernel=[8, 8])),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_another_release_are_not_known(name):
    of, rename = NAMES[name]
    renamed = rename(case(of))
    assert renamed.keys() != case(of).keys() or name == "of today"
    found, expected = vitfast.load(renamed), vitfast.load(case(of))
    assert_equal(found.state_dict(), expected.state_dict())
    assert found.config == expected.config
    if name == "SigLIP":
        assert set(found.load_report.ignored.values()) == {
            "the text tower", "scale and shift of the similarity of images and texts",
        }  # fmt: skip


def test_text_of_paligemma_is_read_or_its_tokens_are_pooled():
    state = under("params/img/", params__llm__final_norm__scale=[8])(case("big_vision none scan"))
    model = vitfast.load(state, dtype=torch.float64)
    assert flax_differs(model, "big_vision none scan", 32) < 3e-6
    assert [*model.load_report.ignored.values()] == ["the language model"]


def test_blocks_of_a_scan_are_in_another_order():
    """The same weights, one by one and stacked."""
    alone, at = case("big_vision map"), "Transformer/encoderblock"
    stacked = {name: value for name, value in alone.items() if not name.startswith(f"{at}_")}
    for name in alone:
        if name.startswith(f"{at}_0/"):
            stacked[name.replace("_0/", "/", 1)] = torch.stack([alone[name], alone[name.replace("_0/", "_1/", 1)]])
    assert stacked.keys() == CASES["big_vision map scan"]["keys"].keys()
    assert_equal(vitfast.load(stacked).state_dict(), vitfast.load(alone).state_dict())


@pytest.mark.parametrize("name", CASES)
def test_what_is_written_is_not_what_was_read(name):
    state = case(name)
    model = vitfast.load(state, **options(name))
    layout = next(layout for layout in LAYOUTS if layout.name == model.load_report.layout)
    back = written(layout, model.state_dict(), model.config)
    pos_embed = re.compile("Transformer/posembed_input/")
    state = {pos_embed.sub("", key): value for key, value in state.items()}
    assert_equal(back, state)


def test_positions_that_are_learned_are_dropped_when_written():
    model = vitfast.load(case("big_vision gap sincos2d"), image_size=32)
    layout = next(layout for layout in LAYOUTS if layout.name == "google-sincos2d")
    model.pos_embed.data += 1
    with pytest.raises(NotImplementedError, match="no place for pos_embed"):
        written(layout, model.state_dict(), model.config)


# against timm


def npz_of(model, path, big_vision=True):
    """A model of timm under Google's names."""
    D, heads = model.embed_dim, model.blocks[0].attn.num_heads
    names = {"embedding/kernel": model.patch_embed.proj.weight.permute(2, 3, 1, 0)}
    names["embedding/bias"] = model.patch_embed.proj.bias
    names["pos_embedding" if big_vision else "Transformer/posembed_input/pos_embedding"] = model.pos_embed
    names |= {"cls": model.cls_token} if model.cls_token is not None else {}
    dense = {"head": model.head} if isinstance(model.head, torch.nn.Linear) else {}
    norms = {"Transformer/encoder_norm": model.norm}

    def attend(at, parts, weight, bias, proj):
        many = len(parts)
        for part, kernel, b in zip(parts, weight.chunk(many), bias.chunk(many), strict=True):
            names[f"{at}/{part}/kernel"] = kernel.T.reshape(D, heads, D // heads)
            names[f"{at}/{part}/bias"] = b.reshape(heads, D // heads)
        names[f"{at}/out/kernel"], names[f"{at}/out/bias"] = proj.weight.T.reshape(heads, D // heads, D), proj.bias

    attention, norm, mlp = (0, 1, 0) if big_vision else (1, 2, 3)
    for i, block in enumerate(model.blocks):
        at = f"Transformer/encoderblock_{i}"
        norms |= {f"{at}/LayerNorm_0": block.norm1, f"{at}/LayerNorm_{norm}": block.norm2}
        qkv = block.attn.qkv
        at_attention = f"{at}/MultiHeadDotProductAttention_{attention}"
        attend(at_attention, ("query", "key", "value"), qkv.weight, qkv.bias, block.attn.proj)
        dense |= {f"{at}/MlpBlock_{mlp}/Dense_{n}": getattr(block.mlp, f"fc{n + 1}") for n in (0, 1)}
    if model.attn_pool is not None:
        pool, at = model.attn_pool, "MAPHead_0"
        names[f"{at}/probe"] = pool.latent
        norms[f"{at}/LayerNorm_0"] = pool.norm
        at_attention = f"{at}/MultiHeadDotProductAttention_0"
        attend(at_attention, ("key", "value"), pool.kv.weight, pool.kv.bias, pool.proj)
        attend(at_attention, ("query",), pool.q.weight, pool.q.bias, pool.proj)
        dense |= {f"{at}/MlpBlock_0/Dense_{n}": getattr(pool.mlp, f"fc{n + 1}") for n in (0, 1)}
    for name, module in norms.items():
        names |= {f"{name}/scale": module.weight, f"{name}/bias": module.bias}
    for name, module in dense.items():
        names |= {f"{name}/kernel": module.weight.T, f"{name}/bias": module.bias}
    np.savez(path, **{name: value.detach().numpy() for name, value in names.items()})


SMALL = {"embed_dim": 128, "num_heads": 2}
TIMM = {
    "AugReg": ("vit_tiny_patch16_224", {"num_classes": 7}, False),
    "SAM": ("vit_small_patch32_224", SMALL | {"num_classes": 7}, False),
    "SigLIP": ("vit_base_patch16_siglip_224", SMALL, True),
    "gap": ("vit_base_patch16_siglip_gap_224", SMALL | {"num_classes": 7}, True),
    "SigLIP2 of odd width": ("vit_so400m_patch14_siglip_224", {"embed_dim": 144, "num_heads": 2}, True),
}


@pytest.mark.parametrize("gelu", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("name", TIMM)
def test_a_file_is_read_otherwise_than_timm_reads_it(name, gelu, tmp_path):
    """Weights bit by bit, tokens and logits, with timm's erf and with Google's tanh; also where positions change."""
    timms, how, big_vision = TIMM[name]
    build = lambda **size: timm.create_model(timms, depth=2, act_layer=gelu, **how | size)  # noqa: E731
    patch = build().patch_embed.patch_size[0]
    small, large = {"img_size": 3 * patch}, {"img_size": 4 * patch}
    make_trained_like(theirs := build(**small), torch.randn(2, 3, 3 * patch, 3 * patch))
    npz_of(theirs, tmp_path / "x.npz", big_vision)
    for size in (small, large):
        # timm resamples these bilinearly, without aligned corners
        read = build(**size, checkpoint_path=str(tmp_path / "x.npz")).eval()
        given = {} if gelu == "gelu_tanh" else {"activation": "gelu"}
        ours = vitfast.load(tmp_path / "x.npz", image_size=size["img_size"], resampling="bilinear", **given)
        expected = {name: value for name, value in read.state_dict().items() if name != "pos_embed"}
        found = ours.state_dict()
        torch.testing.assert_close(found.pop("pos_embed"), read.pos_embed.data, rtol=0, atol=1e-6)
        assert_equal(found, expected)
        ours.pos_embed.data.copy_(read.pos_embed.data)
        images = torch.randn(2, 3, *[size["img_size"]] * 2, dtype=torch.float64)
        with torch.no_grad():
            ours, read = ours.double(), read.double()
            for one, other in (
                (ours.forward_features(images), read.forward_features(images)),
                (ours(images), read(images)),
            ):
                assert (one - other).norm() <= 1e-10 * other.norm()


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_halves_are_read_in_part(half, tmp_path):
    """big_vision's bf16 comes out of numpy as two bytes without a type."""
    state = case("big_vision map")
    rounded = {name: value.to(getattr(torch, half)) for name, value in state.items()}
    mixed = rounded | {"pos_embedding": state["pos_embedding"]}
    arrays = {
        name: value.view(torch.int16).numpy().view("V2") if value.dtype is torch.bfloat16 else value.numpy()
        for name, value in mixed.items()
    }
    np.savez(tmp_path / "x.npz", **arrays)
    found = vitfast.load(tmp_path / "x.npz", dtype=torch.float32)
    expected = vitfast.load({name: value.float() for name, value in mixed.items()}, dtype=torch.float32)
    assert_equal(found.state_dict(), expected.state_dict())


# the lists that are committed, and what no config describes


def described(state, given):
    found = recognise(state, Facts())
    known = found.layout.describe(found.view, Facts(), given)
    config = vitfast.ViTConfig(**known.fields)
    with torch.device("meta"):
        own = own_weights(ViT.from_config(config))
    return found.layout.name, config, sources_of(found.layout, found.view, config, own)


def published(name):
    content = json.loads((LISTS / f"{name}.json").read_text())
    assert content["source"].startswith("https://github.com/google-research/")
    return {key: torch.empty(shape, device="meta") for key, shape in content["keys"].items()}


GAP = dict(pool="mean", class_token=False, norm_after_pool=False)
# list of names -> (layout, what is given, what it is in timm's names, weights of no use)
PUBLISHED = {
    "google_vision_transformer_b_16": ("google", {}, config_for("vit_base_patch16_224"), {}),
    "google_vision_transformer_b_16_in21k": (
        "google", {"num_classes": 0}, config_for("vit_base_patch16_224", num_classes=0),
        {"the representation layer, with the classifier that reads it": 2,
         "the classifier that reads the representation layer": 2},
    ),
    "google_big_vision_b_16": (
        "google", {}, config_for("vit_base_patch16_224").replace(pos_embed="patches"), {},
    ),
    "google_big_vision_s_16_i1k": (
        "google-sincos2d", {"num_classes": 0}, config_for("vit_small_patch16_224", num_classes=0).replace(**GAP),
        {"the representation layer, with the classifier that reads it": 2,
         "the classifier that reads the representation layer": 2},
    ),
    "google_big_vision_paligemma_img": (
        "google-scan", {},
        config_for("vit_so400m_patch14_siglip_gap_224", num_classes=2048).replace(**GAP), {},
    ),
    "google_big_vision_siglip_b_16": (
        "google", {}, config_for("vit_base_patch16_siglip_224"),
        {"the text tower": 38, "scale and shift of the similarity of images and texts": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_not_recognised_or_in_part(name):
    layout, given, expected, ignored = PUBLISHED[name]
    found, config, sources = described(published(name), given)
    assert found == layout
    assert config == expected.replace(depth=2, activation="gelu_tanh")
    whats = [*sources.ignored.values()]
    assert {what: whats.count(what) for what in whats} == ignored


def with_representation():
    state = case("big_vision tok")
    return state | {"pre_logits/kernel": torch.ones(64, 64), "pre_logits/bias": torch.ones(64)}


@pytest.mark.parametrize("given", [{}, {"num_classes": 5}])
def test_representation_layer_is_dropped_without_a_word(given):
    with pytest.raises(NotImplementedError, match=r"representation layer \(pre_logits.*num_classes=0"):
        vitfast.load(with_representation(), **given)


def test_backbone_before_a_representation_layer_is_lost():
    expected = vitfast.load(case("big_vision tok"), num_classes=0).state_dict()
    assert_equal(vitfast.load(with_representation(), num_classes=0).state_dict(), expected)
    fresh = vitfast.load(with_representation(), num_classes=9)
    assert fresh.head.weight.shape == (9, 64) and not fresh.head.weight.any()
    assert "the representation layer" in str(fresh.load_report)


def changed(name, **more):
    return case(name) | {key.replace("__", "/"): torch.ones(shape) for key, shape in more.items()}


AT = "MultiHeadDotProductAttention_0"
WRONG = {
    "hybrid": (changed("big_vision tok", conv_root__kernel=[7, 7, 3, 64]), {}, NotImplementedError, "Google's hybrids"),
    "NaFlex": (
        changed("big_vision map", embedding__kernel=[192, 64]), {}, NotImplementedError, "NaFlex.*patches of any shape",
    ),
    "heads of the pooling": (
        changed("big_vision map", MAPHead_0__MultiHeadDotProductAttention_0__query__kernel=[64, 2, 32]), {},
        RuntimeError, "heads must be 2, as the weights have them, got 4",
    ),
    "heads of one block": (
        changed("big_vision tok", **{f"Transformer__encoderblock_1__{AT}__out__kernel": [8, 8, 64]}), {},
        RuntimeError, "heads must be 8, as the weights have them, got 4",
    ),
    "heads that were given": (
        case("big_vision tok"), {"heads": 8, "head_dim": 8}, RuntimeError, "heads must be 4, as the weights have them",
    ),
    "a block too many in a scan": (
        changed("big_vision map scan", Transformer__encoderblock__MlpBlock_0__Dense_0__bias=[3, 160]), {},
        RuntimeError, "there must be 2 blocks, got 3",
    ),
    "a weight too many": (changed("big_vision tok", Transformer__extra=[3]), {}, RuntimeError, "unexpected.*extra"),
    "no square": (
        changed("big_vision gap", pos_embedding=[1, 15, 64]), {}, ValueError, "15 patches, which is no square",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_weights_that_do_not_fit_are_read(name):
    state, given, error, said = WRONG[name]
    with pytest.raises(error, match=said):
        vitfast.load(state, **given)


def test_grid_that_is_given_is_passed_over():
    state = changed("big_vision tok", pos_embedding=[1, 15, 64])
    assert vitfast.load(state, grid=(3, 5)).config.image_size == (24, 40)
    config = vitfast.load(state, grid=(2, 7)).config
    assert (config.image_size, config.pos_embed) == ((16, 56), "all")
