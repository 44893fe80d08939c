"""Weights under names that are not the model's: taken for others, refused without a way on, or advice that fails."""

import re

import pytest
import timm
import torch
import transformers
import vit_pytorch
from foreign_files import assert_loaded, build, read, settings, unwrapped_of
from torch.optim.swa_utils import AveragedModel
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.dino import Dino
from vit_pytorch.mae import MAE
from vit_pytorch.simple_vit import SimpleViT
from vit_pytorch.vit_for_small_dataset import ViT as ViTForSmallDataset
from vit_pytorch.vit_with_patch_dropout import ViT as ViTWithPatchDropout

import vitfast

TRAINED = dict(zip(("loss.weight", "loss.bias"), torch.ones(2, 3), strict=True))

# what holds two models: the choices that its error names
TWO = {
    "sets": lambda a, b: {"student": a, "teacher": b, "epoch": 3},
    "prefixes": lambda a, b: {f"{n}.{k}": v for n, state in (("student", a), ("teacher", b)) for k, v in state.items()},
    "prefixes in a run": lambda a, b: {"state_dict": TWO["prefixes"](a, b), "args": settings()},
}


@pytest.mark.parametrize("content", TWO.values(), ids=TWO.keys())
@pytest.mark.parametrize("strict", [True, False])
def test_one_of_two_models_is_taken_unasked(content, strict, tmp_path):
    student, teacher, path = build(), build(), tmp_path / "dino.pth"
    torch.save(content(student.state_dict(), teacher.state_dict()), path)
    model = build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises((ValueError, RuntimeError), match="(?s)student.*teacher.*key='student'"):
        vitfast.load_checkpoint(model, path, allow_pickle=True, strict=strict)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert_loaded(read(path, key="student"), student)
    assert_loaded(read(path, key="teacher"), teacher)
    with pytest.raises(ValueError, match="nothing under key='nobody'"):
        read(path, key="nobody")


def test_model_beside_other_weights_is_not_found(tmp_path):
    """A loss with weights of its own under another name: the error says what to ask for."""
    model, path = build(), tmp_path / "lit.ckpt"
    torch.save({"state_dict": unwrapped_of("model.")(model) | TRAINED}, path)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=r"stand under 'model\.'.*key='model'"):
            read(path, strict=strict)
    assert_loaded(read(path, key="model"), model)


def test_part_of_a_set_cannot_be_chosen(tmp_path):
    model, path = build(), tmp_path / "dinov2.pth"
    torch.save({"teacher": unwrapped_of("backbone.")(model) | TRAINED, "student": TRAINED}, path)
    assert_loaded(read(path, key="teacher.backbone"), model)


def test_two_names_become_one_silently(tmp_path):
    state = build().state_dict()
    torch.save(state | {"module.head.bias": torch.ones(5)}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match=r"'head\.bias' and 'module\.head\.bias' are both 'head\.bias'"):
        read(tmp_path / "m.pt")


PREFIXES = {
    "model.": "every key starts with 'model.': take it off",
    "encoder.": "every key starts with 'encoder.': take it off",
    "base_model.model.": "every key starts with 'base_model.model.': take it off",
    "module.": "every key starts with 'module.', which a wrapper put there: take it off",
    "_fsdp_wrapped_module.": "every key starts with '_fsdp_wrapped_module.', which a wrapper put there: take it off",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefix_of_a_state_dict_is_not_named(prefix):
    model = build()
    with pytest.raises(RuntimeError, match=PREFIXES[prefix]):
        model.load_state_dict(unwrapped_of(prefix, "_checkpoint_wrapped_module.")(model))


def test_wrapper_within_the_keys_is_not_named():
    model = build()
    with pytest.raises(RuntimeError, match="keys hold '_checkpoint_wrapped_module.', which a wrapper put there"):
        model.load_state_dict(unwrapped_of("", "_checkpoint_wrapped_module.")(model))


def theirs_of(kind=vit_pytorch.ViT, **changes):
    small = dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, mlp_dim=128)
    return kind(**small | changes)


def test_vit_pytorch_names_under_a_prefix_are_refused(tmp_path):
    model, other = theirs_of(vitfast.ViT), theirs_of(vitfast.ViT)
    torch.save({f"model.{k}": v for k, v in model.state_dict(layout="vit_pytorch").items()}, tmp_path / "m.pt")
    assert_loaded(vitfast.load_checkpoint(other, tmp_path / "m.pt", allow_pickle=True), model)


# (weights among others, the model that is among them): what the error recommends
def of_dino():
    vit = theirs_of()
    how = dict(hidden_layer="to_latent", projection_hidden_size=32, projection_layers=2, num_classes_K=64)
    dino = Dino(vit, image_size=32, **how)
    dino(torch.randn(2, 3, 32, 32))
    return dino.state_dict(), theirs_of(vitfast.ViT), vit.state_dict()


def of_mae():
    vit = theirs_of(pool="mean")
    state = MAE(encoder=vit, decoder_dim=32, masking_ratio=0.5).state_dict()
    return state, theirs_of(vitfast.ViT, pool="mean"), vit.state_dict()


def of_vit_pytorch_in_a_holder():
    vit = theirs_of()
    state = {f"net.enc.{key}": value for key, value in vit.state_dict().items()} | TRAINED
    return state, theirs_of(vitfast.ViT), vit.state_dict()


def of_a_headless_teacher():
    model = build()
    state = {k: v for k, v in unwrapped_of("teacher.backbone.")(model).items() if "head." not in k} | TRAINED
    return state, build(), {k: v for k, v in model.state_dict().items() if "head." not in k}


def of_averages_in_a_holder():
    model = build()
    holder = torch.nn.ModuleDict({"loss": torch.nn.Linear(2, 2), "ema": AveragedModel(model)})
    return holder.state_dict(), build(), model.state_dict()


AMONG_OTHERS = [of_dino, of_mae, of_vit_pytorch_in_a_holder, of_a_headless_teacher, of_averages_in_a_holder]


@pytest.mark.parametrize("among", AMONG_OTHERS, ids=lambda among: among.__name__)
def test_recommended_key_is_missing_or_fails(among, tmp_path):
    torch.manual_seed(0)
    state, model, expected = among()
    torch.save(state, tmp_path / "m.pt")
    for strict in (True, False):
        with pytest.raises(RuntimeError) as error:
            vitfast.load_checkpoint(model, tmp_path / "m.pt", allow_pickle=True, strict=strict)
    key, loose = re.search(r"load_checkpoint takes key='(\S+)'(, strict=False)?\)$", str(error.value)).groups()
    vitfast.load_checkpoint(model, tmp_path / "m.pt", allow_pickle=True, key=key, strict=not loose)
    layout = "vit_pytorch" if model.config.input_norm else "timm"
    loaded = model.state_dict(layout=layout)
    assert all(torch.equal(loaded[name], value) for name, value in expected.items())


STRAY = {
    "fc_norm": lambda s: {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v for k, v in s.items()},
    "norm_pre": lambda s: s | {"norm_pre.weight": torch.ones(192), "norm_pre.bias": torch.ones(192)},
    "attn_pool": lambda s: s | {"attn_pool.norm.weight": torch.ones(192), "attn_pool.norm.bias": torch.ones(192)},
    "stray": lambda s: s | {"stray": torch.ones(1)},
    "loss": lambda s: s | TRAINED,
    "blocks": lambda s: s | {k.replace("blocks.1", "blocks.2"): v for k, v in s.items() if k.startswith("blocks.1")},
    "another size": lambda s: {f"net.{k}": torch.ones(7, 192) if k == "head.weight" else v for k, v in s.items()},
    "half": lambda s: {f"net.{k}": v for k, v in [*s.items()][: len(s) // 2]},
}


@pytest.mark.parametrize("stray", STRAY)
def test_mismatch_is_taken_for_a_prefix(stray):
    """No advice to take off what leaves names that do not fit either."""
    with pytest.raises(RuntimeError, match="nothing was loaded") as error:
        build().load_state_dict(STRAY[stray](build().state_dict()))
    assert not re.search("key=|take it off|These weights", str(error.value))


NEXT_TO_NOTHING = {
    "a linear probe": lambda s: {k if "head" in k else f"model.{k}": v for k, v in s.items()} | TRAINED,
    "a norm": lambda s: {f"layer.{k}": v for k, v in s.items()} | {"norm.weight": torch.ones(192)},
    "a pooling": lambda s: {f"pool.{i}": torch.ones(1) for i in range(9)} | {"norm.weight": torch.ones(192)},
}


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("case", NEXT_TO_NOTHING)
def test_backbone_stays_as_it_was_without_a_word(case, hooked, tmp_path):
    """strict=False, where one generic name among many fits."""
    model, other = build(), build()
    if hooked:
        model._register_load_state_dict_pre_hook(lambda *_: None)
    torch.save(NEXT_TO_NOTHING[case](other.state_dict()), tmp_path / "m.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="nothing was loaded"):
        read_into(model, tmp_path / "m.pt", strict=False)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def read_into(model, path, **how):
    return vitfast.load_checkpoint(model, path, allow_pickle=True, **how)


@pytest.mark.parametrize("part", ["head.", "blocks.0."])
def test_part_of_a_model_is_refused_with_strict_off(part, tmp_path):
    model, other = build(), build()
    with torch.no_grad():
        other.head.bias.fill_(3)
    torch.save({k: v for k, v in other.state_dict().items() if k.startswith(part)}, tmp_path / "m.pt")
    read_into(model, tmp_path / "m.pt", strict=False)
    loaded = [k for k, v in model.state_dict().items() if k.startswith(part) and torch.equal(v, other.state_dict()[k])]
    assert len(loaded) == sum(k.startswith(part) for k in other.state_dict())


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("part", ["mlp_head.", "pos_embedding", "cls_token", "transformer.layers.0.", "transformer.n"])
def test_part_of_vit_pytorchs_weights_is_left_out(part, hooked, tmp_path):
    theirs, model = theirs_of(), theirs_of(vitfast.ViT)
    if hooked:
        model._register_load_state_dict_pre_hook(lambda *_: None)
    state = {key: torch.full_like(value, 3) for key, value in theirs.state_dict().items() if key.startswith(part)}
    holder, held = torch.nn.ModuleDict({"vit": theirs_of(vitfast.ViT)}), {f"vit.{k}": v for k, v in state.items()}
    for given, own, root in ((state, model, model), (held, holder["vit"], holder)):
        result = root.load_state_dict(given, strict=False)
        assert not result.unexpected_keys
        now = own.state_dict(layout="vit_pytorch")
        assert {key for key, value in now.items() if (value == 3).all()} == {*state}


@pytest.mark.parametrize("kind", [SimpleViT, DeepViT, ViTForSmallDataset, ViTWithPatchDropout])
def test_another_model_of_vit_pytorchs_is_called_an_old_one(kind):
    with pytest.raises(RuntimeError) as error:
        theirs_of(vitfast.ViT).load_state_dict(theirs_of(kind).state_dict())
    assert "before" not in str(error.value)
    if kind is not ViTWithPatchDropout:  # all its names are names of the ViT
        assert "names of vit-pytorch: vitfast.ViT takes those of its ViT since release 1.4" in str(error.value)


def test_whole_file_fits_only_a_model_whose_blocks_are_not_wrapped(tmp_path):
    model, other = build(), build()
    vitfast.save_checkpoint(model, tmp_path / "m.safetensors")
    other.blocks[1] = torch.compile(other.blocks[1], backend="eager")
    vitfast.load_checkpoint(other, tmp_path / "m.safetensors")
    assert torch.equal(other.blocks[1]._orig_mod.mlp.fc1.weight, model.blocks[1].mlp.fc1.weight)


TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32)
HUGGING_FACE = {
    "ViTModel": lambda: transformers.ViTModel(transformers.ViTConfig(**TINY)),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**TINY)),
    "DeiT": lambda: transformers.DeiTModel(transformers.DeiTConfig(**TINY)),
    "DINOv2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**TINY)),
    "SigLIP": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TINY)),
    "CLIP": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**TINY)),
    "AIMv2": lambda: transformers.Aimv2VisionModel(transformers.Aimv2VisionConfig(**TINY)),
    "Pixtral": lambda: transformers.PixtralVisionModel(transformers.PixtralVisionConfig(**TINY)),
    "DINOv3": lambda: transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**TINY, patch_size=16)),
}


UNREAD = ("AIMv2", "Pixtral", "DINOv3")


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_weights_are_so_many_unknown_keys(family, tmp_path):
    """In memory and in the file, whose names differ: whose they are is said, or that they are of another size."""
    theirs = HUGGING_FACE[family]()
    said = "nothing was loaded. These weights have the names of Hugging Face's transformers: vitfast.load builds"
    with pytest.raises(RuntimeError, match=said):
        build().load_state_dict(theirs.state_dict())
    theirs.save_pretrained(tmp_path)
    model = build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for strict in (True, False):
        with pytest.raises((RuntimeError, NotImplementedError), match=said if family in UNREAD else "must be"):
            vitfast.load_checkpoint(model, tmp_path, strict=strict)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def under_facebooks_names(theirs):
    """Weights of timm's DINOv2 with registers as facebook has them: a class token with positions and registers."""
    state = theirs.state_dict()
    registers, positions = state.pop("reg_token"), state.pop("pos_embed")
    token = torch.zeros(1, 1, positions.shape[-1])
    return state | {
        "register_tokens": registers, "mask_token": token[0], "pos_embed": torch.cat([token, positions], dim=1),
    }  # fmt: skip


def test_weights_of_facebooks_dinov2_are_not_named_or_the_advice_fails():
    name, keywords = "vit_small_patch14_reg4_dinov2", dict(img_size=28, depth=2)
    theirs = timm.create_model(name, **keywords)
    state, model = under_facebooks_names(theirs), vitfast.create_model(name, **keywords).eval()
    with pytest.raises(RuntimeError, match=r"names of facebook's DINOv2: vitfast\.load builds"):
        model.load_state_dict(state)
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, theirs))
    assert_loaded(model, vitfast_of(theirs, name, **keywords))


def test_mask_token_of_anybody_is_called_facebooks():
    """SimMIM, iBOT, BEiT and others have one; that it does not fit is all there is to say."""
    with pytest.raises(RuntimeError, match=r"1 keys do not fit ViT; nothing was loaded\.\n  unexpected: mask_token$"):
        build().load_state_dict(build().state_dict() | {"mask_token": torch.zeros(1, 1, 192)})


def vitfast_of(theirs, name, **keywords):
    model = vitfast.create_model(name, **keywords).eval()
    model.load_state_dict(theirs.state_dict())
    return model


def clip_of(theirs):
    """Weights of timm's model under OpenAI's names."""
    state = {"logit_scale": torch.ones(()), "transformer.resblocks.0.ln_1.weight": torch.ones(8)}
    state["visual.class_embedding"] = theirs.cls_token.detach().flatten()
    state["visual.positional_embedding"] = theirs.pos_embed.detach()[0]
    state["visual.conv1.weight"] = theirs.patch_embed.proj.weight.detach()
    state["visual.proj"] = theirs.head.weight.detach().T
    pairs = {"norm_pre": "ln_pre", "norm": "ln_post"}
    for i in range(len(theirs.blocks)):
        here, there = f"blocks.{i}", f"transformer.resblocks.{i}"
        pairs |= {f"{here}.norm{n}": f"{there}.ln_{n}" for n in (1, 2)}
        pairs |= {f"{here}.attn.proj": f"{there}.attn.out_proj", f"{here}.mlp.fc1": f"{there}.mlp.c_fc"}
        pairs[f"{here}.mlp.fc2"] = f"{there}.mlp.c_proj"
        for kind in ("weight", "bias"):
            state[f"visual.{there}.attn.in_proj_{kind}"] = theirs.state_dict()[f"{here}.attn.qkv.{kind}"]
    for ours, name in pairs.items():
        for kind in ("weight", "bias"):
            state[f"visual.{name}.{kind}"] = theirs.state_dict()[f"{ours}.{kind}"]
    return state


def test_weights_of_openais_clip_are_taken_for_vit_pytorchs():
    """CLIP's text model is called `transformer`, as vit-pytorch's blocks are."""
    name, keywords = "vit_base_patch32_clip_quickgelu_224", dict(img_size=32, depth=2, num_classes=16)
    theirs = timm.create_model(name, **keywords)
    model, state = vitfast.create_model(name, **keywords).eval(), clip_of(theirs)
    with pytest.raises(RuntimeError, match="names of OpenAI's CLIP and open_clip: vitfast.load"):
        model.load_state_dict(state)
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, theirs), strict=False)
    assert torch.equal(model.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


OTHERS = {
    "encoder.layers.encoder_layer_0.ln_1.weight": "torchvision",
    "Transformer/encoderblock_0/LayerNorm_0/scale": "JAX",
    "decoder_blocks.0.norm1.weight": "masked autoencoders",
    "preprocessor.patchifier.proj.weight": "AIMv2",
    "vit.encoder.layer.0.attention.attention.query.weight": "Hugging Face's transformers",
}


@pytest.mark.parametrize("key", OTHERS)
def test_known_names_of_another_library_are_not_named(key):
    with pytest.raises(RuntimeError, match=f"These weights have the names of {OTHERS[key]}"):
        build().load_state_dict(build().state_dict() | {key: torch.ones(3)})
