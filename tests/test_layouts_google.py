"""Google's npz files: kernels transposed or read in another order, another GELU than the original's without a word."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import timm
import torch
from test_load import assert_same, filled, timms

import vitfast

NORMS = {"scale": "weight", "bias": "bias"}


def arrays_of(model, *, numbers=("1", "3", "2"), positions="Transformer/posembed_input/pos_embedding"):
    """timm's weights as flax has them.

    numbers: of attention, of the MLP, of the second norm: ('1', '3', '2') in the first files, ('0', '0', '1') since.
    """
    state, H = {name: value.float() for name, value in model.state_dict().items()}, model.blocks[0].attn.num_heads
    attention, mlp, norm = numbers
    found = {}

    def dense(theirs, ours):
        found[f"{theirs}/kernel"], found[f"{theirs}/bias"] = state[f"{ours}.weight"].T, state[f"{ours}.bias"]

    def normed(theirs, ours):
        found.update({f"{theirs}/{kind}": state[f"{ours}.{name}"] for kind, name in NORMS.items()})

    def heads(theirs, weight, bias):
        found[f"{theirs}/kernel"] = weight.T.reshape(weight.shape[1], H, -1)
        found[f"{theirs}/bias"] = bias.reshape(H, -1)

    def out(theirs, ours):
        weight = state[f"{ours}.weight"]
        found[f"{theirs}/kernel"], found[f"{theirs}/bias"] = weight.T.reshape(H, -1, len(weight)), state[f"{ours}.bias"]

    for i in range(len(model.blocks)):
        at, ours = f"Transformer/encoderblock_{i}", f"blocks.{i}"
        mha = f"{at}/MultiHeadDotProductAttention_{attention}"
        normed(f"{at}/LayerNorm_0", f"{ours}.norm1")
        normed(f"{at}/LayerNorm_{norm}", f"{ours}.norm2")
        parts = zip(state[f"{ours}.attn.qkv.weight"].chunk(3), state[f"{ours}.attn.qkv.bias"].chunk(3), strict=True)
        for name, (weight, bias) in zip(("query", "key", "value"), parts, strict=True):
            heads(f"{mha}/{name}", weight, bias)
        out(f"{mha}/out", f"{ours}.attn.proj")
        for n, fc in enumerate(("fc1", "fc2")):
            dense(f"{at}/MlpBlock_{mlp}/Dense_{n}", f"{ours}.mlp.{fc}")
    normed("Transformer/encoder_norm", "norm")
    found["embedding/kernel"] = state["patch_embed.proj.weight"].permute(2, 3, 1, 0)
    found["embedding/bias"], found[positions] = state["patch_embed.proj.bias"], state["pos_embed"]
    if "cls_token" in state:
        found["cls"] = state["cls_token"]
    if "head.weight" in state:
        dense("head", "head")
    if "attn_pool.latent" in state:
        at, mha = "MAPHead_0", "MAPHead_0/MultiHeadDotProductAttention_0"
        found[f"{at}/probe"] = state["attn_pool.latent"]
        heads(f"{mha}/query", state["attn_pool.q.weight"], state["attn_pool.q.bias"])
        parts = zip(state["attn_pool.kv.weight"].chunk(2), state["attn_pool.kv.bias"].chunk(2), strict=True)
        for name, (weight, bias) in zip(("key", "value"), parts, strict=True):
            heads(f"{mha}/{name}", weight, bias)
        out(f"{mha}/out", "attn_pool.proj")
        normed(f"{at}/LayerNorm_0", "attn_pool.norm")
        for n, fc in enumerate(("fc1", "fc2")):
            dense(f"{at}/MlpBlock_0/Dense_{n}", f"attn_pool.mlp.{fc}")
    return {name: value.detach().contiguous().numpy() for name, value in found.items()}


NEW = dict(numbers=("0", "0", "1"), positions="pos_embedding")


def stacked(arrays):
    """As jax.lax.scan keeps them: one array for all blocks."""
    names = {name.split("/", 2)[2] for name in arrays if name.startswith("Transformer/encoderblock_")}
    depth = len({name.split("/")[1] for name in arrays if name.startswith("Transformer/encoderblock_")})
    rest = {name: value for name, value in arrays.items() if not name.startswith("Transformer/encoderblock_")}
    at = "Transformer/encoderblock"
    return rest | {f"{at}/{n}": np.stack([arrays[f"{at}_{i}/{n}"] for i in range(depth)]) for n in names}


def under(prefix, **more):
    return lambda arrays: {f"{prefix}{name}": value for name, value in arrays.items()} | more


TEXT = {"params/txt/Embed_0/embedding": np.zeros((5, 3), np.float32), "params/t": np.zeros(1, np.float32)}
GAP = {"class_token": False, "global_pool": "avg", "fc_norm": False}
SIGLIP = under("params/img/", **TEXT)
OPTIMISER = under("opt/target/", **{"opt/state/step": np.ones(1)})


def inlined(arrays):
    """The pooling's parts as they stood while ViT-G was developed."""
    return {name.removeprefix("MAPHead_0/"): value for name, value in arrays.items()}


# (timm's name, keywords, how flax numbers, what is around)
CASES = {
    "first files": ("vit_tiny_patch16_224", {"num_classes": 7}, {}, dict),
    "without a classifier": ("vit_tiny_patch16_224", {"num_classes": 0}, {}, dict),
    "with its optimiser": ("vit_tiny_patch16_224", {"num_classes": 7}, {}, OPTIMISER),
    "big_vision": ("vit_tiny_patch16_224", GAP, NEW, under("params/")),
    "class token without position": ("vit_tiny_patch16_224", {"no_embed_class": True, "num_classes": 7}, NEW, dict),
    "stacked": ("vit_tiny_patch16_224", {"num_classes": 7}, NEW, stacked),
    "SigLIP": ("vit_base_patch16_siglip_224", {}, NEW, SIGLIP),
    "SigLIP stacked": ("vit_base_patch16_siglip_224", {}, NEW, lambda arrays: SIGLIP(stacked(arrays))),
    "pooling without a name": ("vit_base_patch16_siglip_224", {}, NEW, inlined),
}


def written(case, path, dtype=np.float32):
    name, keywords, how, around = CASES[case]
    theirs = timms(name, depth=2, img_size=64, act_layer="gelu_tanh", **keywords)
    with torch.no_grad():
        for value in theirs.parameters():
            value.copy_(value.bfloat16())
    np.savez(
        path,
        **{k: v.astype(dtype) if v.dtype == np.float32 else v for k, v in around(arrays_of(theirs, **how)).items()},
    )
    return theirs


@pytest.mark.parametrize("image_size", [64, 96])
@pytest.mark.parametrize("case", CASES)
def test_original_computes_something_else(case, image_size, tmp_path):
    theirs = written(case, tmp_path / "m.npz")
    ours = vitfast.load(tmp_path / "m.npz", image_size=image_size)
    if image_size == 64:
        for name, value in theirs.state_dict().items():
            assert torch.equal(ours.state_dict()[name], value), name
    else:
        theirs.set_input_size(image_size)
        theirs.pos_embed.data.copy_(ours.pos_embed)
    assert_same(ours, theirs, torch.randn(2, 3, image_size, image_size))
    said = str(ours.load_report)
    assert (
        "flax's nn.gelu" in said and "timm takes erf" in said and ours.load_report.preprocessing["mean"] == (0.5,) * 3
    )
    assert ("text tower" in said) == ("SigLIP" in case)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_read_as_other_numbers(dtype, tmp_path):
    """JAX writes bf16 as bytes without a type."""
    theirs = written("first files", tmp_path / "m.npz", dtype)
    ours = vitfast.load(tmp_path / "m.npz")
    for name, value in theirs.state_dict().items():
        expected = value if dtype is not np.float16 else value.half().float()
        assert torch.equal(ours.state_dict()[name], expected), name


@pytest.mark.parametrize("case", ["first files", "big_vision", "SigLIP", "SigLIP stacked"])
def test_weights_differ_from_those_that_timm_reads(case, tmp_path):
    theirs = written(case, tmp_path / "m.npz")
    name, keywords, *_ = CASES[case]
    by_timm = filled(timm.create_model(name, depth=2, img_size=64, **keywords))
    by_timm.load_pretrained(str(tmp_path / "m.npz"))
    assert all(torch.equal(theirs.state_dict()[name], value) for name, value in by_timm.state_dict().items())
    erf = vitfast.load(tmp_path / "m.npz", activation="gelu")
    assert_same(erf, by_timm.eval(), torch.randn(2, 3, 64, 64))
    assert "flax" not in str(erf.load_report)


LISTS = {"google_vit_b16": "vit_base_patch16_224", "big_vision_siglip_b16": "vit_base_patch16_siglip_224"}


@pytest.mark.parametrize("published", LISTS)
def test_published_names_are_taken_for_another_model(published):
    told = json.loads((Path(__file__).parent / "layouts" / f"{published}.json").read_text())
    ours = vitfast.load({name: torch.zeros(shape) for name, shape in told["keys"].items()})
    expected = vitfast.config_for(LISTS[published], depth=1, act_layer="gelu_tanh")
    assert ours.config == expected


def test_layer_before_the_classifier_is_dropped_without_a_word(tmp_path):
    written("first files", tmp_path / "m.npz")
    arrays = dict(np.load(tmp_path / "m.npz"))
    arrays |= {"pre_logits/kernel": np.zeros((192, 192), np.float32), "pre_logits/bias": np.zeros(192, np.float32)}
    np.savez(tmp_path / "m.npz", **arrays)
    with pytest.raises(NotImplementedError, match=r"pre_logits is a layer with tanh.*num_classes=0"):
        vitfast.load(tmp_path / "m.npz")
    assert vitfast.load(tmp_path / "m.npz", num_classes=0).num_classes == 0


def test_hybrid_is_not_named(tmp_path):
    written("first files", tmp_path / "m.npz")
    np.savez(tmp_path / "m.npz", **dict(np.load(tmp_path / "m.npz")), **{"conv_root/kernel": np.zeros((7, 7, 3, 64))})
    with pytest.raises(NotImplementedError, match="Google's hybrids"):
        vitfast.load(tmp_path / "m.npz")
