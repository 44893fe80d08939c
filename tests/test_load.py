"""`vitfast.load`: weights under the wrong names, a model that computes something else, a difference without a word."""

import json

import pytest
import timm
import torch
import transformers
from safetensors.torch import save_file

import vitfast
from vitfast.timm_names.variants import VARIANTS, config_for
from vitfast.weights.layouts.layout import NeedsArgument

transformers.utils.logging.disable_progress_bar()
WIDE = 1100  # above, models of one block have 20 million weights and more


def filled(model, std=0.05):
    """Every weight drawn, so that none that is lost has no effect."""
    model = model.to_empty(device="cpu") if next(model.parameters()).is_meta else model
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                # gains of norms around one
                weight.normal_(std=std).add_(float(weight.dim() == 1 and name.endswith("weight")))
    return model.eval()


def timms(name, **keywords):
    with torch.device("meta"):
        return filled(timm.create_model(name, **keywords))


@torch.no_grad()
def assert_same(ours, theirs, images, output=None, ours_output=None):
    """In fp64, where a formula that differs is plain."""
    expected = (output or (lambda out: out))(theirs.double()(images.double()))
    found = (ours_output or (lambda model, x: model(x)))(ours.double(), images.double())
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def load_and_answer(source, config, **keywords):
    """As a user does who reads errors: what has to be given is given."""
    answers = {}
    for _ in range(4):
        try:
            return vitfast.load(source, **keywords, **answers), answers
        except NeedsArgument as error:
            field = str(error).split(": ")[-2].split(" must be given")[0]
            assert field not in answers, error
            answers[field] = getattr(config, field)
    raise AssertionError(f"asks without end: {answers}")


def computes_alike(one, other):
    """Initial values, rates and sizes that are taken besides are no part of the function."""
    rest = dict(layer_scale=None, drop_path=0.0, dynamic_image_size=False, dynamic_pad=False)
    # without prefix tokens positions are of patches either way
    rest |= {} if one.num_prefix_tokens else {"pos_embed": "all"}
    return one.replace(**rest) == other.replace(**rest)


NAMES = [
    pytest.param(name, marks=[pytest.mark.full] * (fields.get("dim", 768) > WIDE)) for name, fields in VARIANTS.items()
]


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_timm_is_taken_for_another(name):
    """In memory, and its bare weights in a file, from which the rest has to be told or asked for."""
    patch = config_for(name).patch_size
    theirs = timms(name, depth=1, img_size=tuple(2 * side for side in patch))
    images = torch.randn(2, 3, *(2 * side for side in patch))
    whole = vitfast.load(theirs)
    ours, answers = load_and_answer(theirs.state_dict(), whole.config)
    assert set(answers) <= {"activation", "heads"}
    assert all(torch.equal(ours.state_dict()[key], value) for key, value in theirs.state_dict().items())
    assert_same(whole, theirs, images)
    assert computes_alike(ours.config, whole.config)


SMALL = dict(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=160, image_size=32, patch_size=8,
)  # fmt: skip
DINOV2 = {name: value for name, value in SMALL.items() if name != "intermediate_size"}
tokens = (lambda out: out.last_hidden_state), (lambda model, x: model.forward_features(x))
logits = (lambda out: out.logits), (lambda model, x: model(x))
HUGGING_FACE = {
    "vit": (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)), tokens),
    "vit tanh": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SMALL, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-3, qkv_bias=False)
        ),
        logits,
    ),
    "vit quick": (
        lambda: transformers.ViTForImageClassification(
            transformers.ViTConfig(**SMALL | {"num_attention_heads": 4}, hidden_act="quick_gelu", num_labels=7)
        ),
        logits,
    ),
    "deit two heads": (
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**SMALL)),
        logits,
    ),
    "deit": (lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**SMALL)), logits),
    "deit tokens": (lambda: transformers.DeiTModel(transformers.DeiTConfig(**SMALL)), tokens),
    "dinov2": (lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2)), tokens),
    "dinov2 swiglu": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**DINOV2, use_swiglu_ffn=True)),
        tokens,
    ),
    "dinov2 registers": (
        lambda: transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**DINOV2)),
        tokens,
    ),
    "vit_msn": (lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**SMALL)), tokens),
    "vit_msn classes": (
        lambda: transformers.ViTMSNForImageClassification(transformers.ViTMSNConfig(**SMALL)),
        logits,
    ),
    "ijepa": (lambda: transformers.IJepaForImageClassification(transformers.IJepaConfig(**SMALL)), logits),
}


@pytest.mark.parametrize("family", HUGGING_FACE)
@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_model_of_hugging_face_is_taken_for_another(family, where, tmp_path):
    build, (theirs_gives, ours_gives) = HUGGING_FACE[family]
    theirs = filled(build()).double()
    if where == "folder":
        theirs.save_pretrained(tmp_path)
    ours = vitfast.load(theirs if where == "memory" else tmp_path, dtype=torch.float64)
    assert_same(ours, theirs, torch.randn(2, 3, 32, 32), theirs_gives, ours_gives)


def test_classifier_that_no_config_describes_is_dropped_without_a_word(tmp_path):
    theirs = filled(transformers.Dinov2ForImageClassification(transformers.Dinov2Config(**DINOV2, num_labels=5)))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match="mean of the patches.*num_classes=0"):
        vitfast.load(tmp_path)
    bare = vitfast.load(tmp_path, num_classes=0)
    assert_same(bare, theirs.dinov2, torch.randn(1, 3, 32, 32), *tokens)
    assert "passed over 2 of a classifier" in str(bare.load_report)


def test_new_classifier_is_not_zero_or_not_said(tmp_path):
    theirs = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    save_file(theirs.state_dict(), tmp_path / "m.safetensors")
    same = vitfast.load(tmp_path / "m.safetensors", num_classes=5)
    assert torch.equal(same.head.weight, theirs.head.weight) and not same.load_report.changed
    other = vitfast.load(tmp_path / "m.safetensors", num_classes=7)
    assert other.head.weight.shape == (7, 192) and not other.head.weight.any() and not other.head.bias.any()
    assert "classifier: a new one, zero, for 7 classes in place of 5" in str(other.load_report)
    assert torch.equal(other.blocks[0].mlp.fc1.weight, theirs.blocks[0].mlp.fc1.weight)
    none = vitfast.load(tmp_path / "m.safetensors", num_classes=0)
    assert_same(none, theirs, torch.randn(1, 3, 32, 32), None, lambda m, x: theirs.head(m(x)))
    theirs.float()
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=7)
    before = model.state_dict()["head.weight"].clone()
    with pytest.raises(
        RuntimeError, match=r"(?s)wrong shape: head\.weight.*num_classes=7\) loads all but the classifier"
    ):
        vitfast.load_checkpoint(model, tmp_path / "m.safetensors")
    assert torch.equal(model.head.weight, before)
    with pytest.raises(ValueError, match="num_classes must be the model's 7, got 5"):
        vitfast.load_checkpoint(model, tmp_path / "m.safetensors", num_classes=5)
    vitfast.load_checkpoint(model, tmp_path / "m.safetensors", num_classes=7)
    assert not model.head.weight.any() and torch.equal(model.cls_token, theirs.cls_token)


def test_weights_of_a_model_with_another_eps_are_loaded_without_a_word(tmp_path):
    """Into a model that is there: the weights fit, and it computes something else."""
    theirs = filled(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL, layer_norm_eps=1e-3)))
    own = vitfast.load(theirs).config
    model = vitfast.ViT.from_config(own.replace(norm_eps=1e-6))
    with pytest.warns(UserWarning, match=r"norm_eps=0\.001, the model has 1e-06"):
        vitfast.load_checkpoint(model, theirs)
    assert torch.equal(model.head.weight, theirs.classifier.weight)


def test_nobodys_weights_are_taken_for_somebodys(tmp_path):
    save_file({"layer1.0.conv1.weight": torch.ones(2, 2, 3, 3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"resnet\.safetensors: weights must be.*got 1 with names such as layer1\.0"):
        vitfast.load(tmp_path / "resnet.safetensors")
    with pytest.raises(TypeError, match="source must be a ViT of vitfast.*got torch.nn.modules.linear.Linear"):
        vitfast.load(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="source must be a path, a state dict or a model, got int"):
        vitfast.load(3)
    with pytest.raises(ValueError, match="as_ must be one of .*hf-vit.*got 'hf'"):
        vitfast.load(tmp_path / "resnet.safetensors", as_="hf")


def broken(state, how):
    state = dict(state)
    if how == "missing":
        del state["blocks.0.norm2.bias"]
    elif how == "left over":
        state["blocks.0.attn.gate.weight"] = torch.ones(3)
    else:
        state["blocks.0.attn.proj.weight"] = torch.ones(192, 191)
    return state


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "missing: blocks.0.norm2.bias"),
        ("left over", r"unexpected: blocks.0.attn.gate.weight \[3\]"),
        ("wrong shape", r"must become blocks.0.attn.proj.weight \[192, 192\], got \[192, 191\]"),
    ],
)
def test_weights_that_do_not_fit_are_loaded_in_part(how, said, tmp_path):
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    save_file(broken(state, how), tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match=f"1 weights do not fit timm:\n  .*{said}"):
        vitfast.load(tmp_path / "m.safetensors")


def test_timms_tools_are_told_another_preprocessing():
    theirs = timms("vit_base_patch16_siglip_224", depth=1, img_size=32)
    ours = vitfast.load(theirs)
    told = timm.data.resolve_data_config(model=ours)
    expected = timm.data.resolve_data_config(model=theirs) | {"input_size": (3, 32, 32)}
    assert {key: told[key] for key in expected} == expected


def test_one_of_two_sets_is_taken_and_not_said(tmp_path):
    """Averaged weights first, as timm does."""
    raw, ema = (timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5) for _ in range(2))
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": ema.state_dict(), "epoch": 3}, tmp_path / "run.pth")
    ours = vitfast.load(tmp_path / "run.pth", allow_pickle=True)
    assert torch.equal(ours.cls_token, ema.cls_token)
    said = "those under 'state_dict_ema', not state_dict beside them"
    assert said in str(ours.load_report)
    vitfast.load_checkpoint(ours, tmp_path / "run.pth", allow_pickle=True, key="state_dict")
    assert torch.equal(ours.cls_token, raw.cls_token) and ours.load_report.chosen == "those under 'state_dict'"


def test_what_stands_beside_a_model_is_an_error_without_a_way_out(tmp_path):
    theirs = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    state = {f"model.{name}": value for name, value in theirs.state_dict().items()} | {"loss.weight": torch.ones(3)}
    torch.save({"state_dict": state}, tmp_path / "lit.ckpt")
    with pytest.raises(RuntimeError, match=r"(?s)unexpected: loss\.weight.*key='model' takes what stands under it"):
        vitfast.load(tmp_path / "lit.ckpt", allow_pickle=True)
    assert torch.equal(vitfast.load(tmp_path / "lit.ckpt", allow_pickle=True, key="model").cls_token, theirs.cls_token)


def test_nan_weights_load_without_a_word(tmp_path):
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    state["blocks.0.mlp.fc1.bias"][3] = torch.nan
    save_file(state, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="has NaN or Inf in blocks.0.mlp.fc1.bias$"):
        model = vitfast.load(tmp_path / "m.safetensors")
    assert model.load_report.not_finite == ("blocks.0.mlp.fc1.bias",)
    with pytest.warns(UserWarning, match="has NaN or Inf in blocks.0.mlp.fc1.bias$"):
        vitfast.load_checkpoint(model, tmp_path / "m.safetensors")


def test_config_of_another_model_beside_a_file_is_believed(tmp_path):
    """Only the file that the config's own library would take has it."""
    theirs = filled(transformers.ViTModel(transformers.ViTConfig(**SMALL, layer_norm_eps=1e-3)))
    theirs.save_pretrained(tmp_path)
    assert (
        vitfast.load(tmp_path).config.norm_eps == vitfast.load(tmp_path / "model.safetensors").config.norm_eps == 1e-3
    )
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert vitfast.load(tmp_path / "other.safetensors", heads=3).config.norm_eps == 1e-12


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_numbers_that_mean_something_else_are_converted(dtype, tmp_path):
    """Eight bits without their scale, truth, complex ones."""
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    state["head.weight"] = state["head.weight"].to(dtype)
    with pytest.raises(ValueError, match=r"weights must be float64.*head\.weight is"):
        vitfast.load(state)
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    before = model.cls_token.clone()
    with pytest.raises(ValueError, match=r"weights must be float64.*head\.weight is"):
        vitfast.load_checkpoint(model, state)
    assert torch.equal(before, model.cls_token)


@pytest.mark.parametrize("name", ["pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc2.weight", "head.weight"])
def test_weight_of_another_rank_ends_in_a_traceback(name):
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    for other in (torch.tensor(1.0), torch.ones(3), torch.ones(2, 2, 2, 2, 2)):
        with pytest.raises((ValueError, RuntimeError), match="load: state dict: "):
            vitfast.load(state | {name: other})


def exchanged(what):
    """A model in which somebody made something other than its class and its weights say."""
    model = timms("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    if what == "hook":
        model.blocks[1].register_forward_hook(lambda module, args, out: out * 2)
    elif what == "forward":
        model.blocks[1].forward = lambda x, **_: x
    elif what == "scale":
        model.blocks[1].attn.scale = 0.5
    elif what == "activation":
        model.blocks[1].mlp.act = torch.nn.GELU("tanh")
    else:
        model.blocks[1].norm1.eps = 1e-3
    return model


@pytest.mark.parametrize("what", ["hook", "forward", "scale", "activation", "eps"])
def test_what_was_exchanged_in_a_model_in_memory_is_lost(what):
    with pytest.raises(NotImplementedError, match=what if what != "forward" else "forward was replaced"):
        vitfast.load(exchanged(what))


def test_a_model_that_was_asked_for_hidden_states_is_taken_for_a_changed_one():
    """transformers leaves hooks behind, which only look."""
    theirs = filled(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL))).double()
    theirs(torch.randn(1, 3, 32, 32).double(), output_hidden_states=True)
    assert any(module._forward_hooks for module in theirs.modules())
    assert_same(vitfast.load(theirs, dtype=torch.float64), theirs, torch.randn(2, 3, 32, 32), *logits)


def test_decoder_beside_an_encoder_is_taken_for_a_part_of_it():
    decoder = dict(decoder_hidden_size=32, decoder_num_attention_heads=2, decoder_num_hidden_layers=1)
    config = transformers.ViTMAEConfig(**SMALL, **decoder, decoder_intermediate_size=64)
    ours = vitfast.load(filled(transformers.ViTMAEForPreTraining(config)))
    assert ours.config.heads == 3 and "decoder of masked pretraining" in str(ours.load_report)


def test_patched_model_is_taken_for_a_changed_one():
    theirs = timms("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5)
    images = torch.randn(2, 3, 32, 32)
    expected = theirs(images)
    vitfast.patch(theirs)
    ours = vitfast.load(theirs)
    assert (ours(images) - expected).norm() < 1e-4 * expected.norm()


def test_config_of_hugging_face_is_believed_where_its_modules_say_otherwise():
    theirs = filled(transformers.ViTForImageClassification(transformers.ViTConfig(**SMALL))).double()
    for module in theirs.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-2
    assert_same(vitfast.load(theirs, dtype=torch.float64), theirs, torch.randn(2, 3, 32, 32), *logits)


def test_a_rectangle_is_taken_for_a_square_without_a_word():
    """14 x 16 patches and a class token are as many positions as 15 x 15 patches without one."""
    theirs = timms("vit_tiny_patch16_224", depth=1, img_size=(224, 256), num_classes=5)
    state = theirs.state_dict()
    with pytest.raises(NeedsArgument, match="pos_embed must be given, pos_embed='patches' or pos_embed='all'"):
        vitfast.load(state)
    for how in ({"image_size": (224, 256)}, {"pos_embed": "all", "grid": (14, 16)}):
        ours = vitfast.load(state, dtype=torch.float64, **how)
        assert ours.config.image_size == (224, 256) and ours.config.pos_embed == "all"
    assert_same(ours, theirs, torch.randn(1, 3, 224, 256))


def test_what_a_config_leaves_out_is_not_what_its_library_takes(tmp_path):
    config = transformers.ViTConfig(**SMALL | {"hidden_size": 384, "num_attention_heads": 12})
    theirs = filled(transformers.ViTForImageClassification(config)).double()
    theirs.save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for left_out in ("num_attention_heads", "layer_norm_eps", "hidden_act"):
        del told[left_out]
    (tmp_path / "config.json").write_text(json.dumps(told))
    ours = vitfast.load(tmp_path, dtype=torch.float64)
    assert_same(ours, theirs, torch.randn(1, 3, 32, 32), *logits)
    assert ours.load_report.assumed["heads"] == "the library's default; config.json leaves it out"


def test_a_number_in_a_name_costs_memory_or_time():
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    with pytest.raises(ValueError, match="blocks 1 of .* are missing"):
        vitfast.load(state | {"blocks.99999999999.norm1.weight": torch.ones(192)})


def test_wrong_use_is_taken_or_ends_in_a_traceback():
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    for how, error, said in (
        ({"grid": (2,)}, TypeError, r"grid must be \(rows, columns\)"),
        ({"grid": 4}, TypeError, "grid must be"),
        ({"dtype": "fp16"}, TypeError, "dtype must be a floating point torch.dtype, got 'fp16'"),
        ({"dtype": torch.int8}, TypeError, "dtype must be"),
        ({"resampling": "x"}, ValueError, "resampling must be one of timm.*got 'x'"),
    ):
        with pytest.raises(error, match=said):
            vitfast.load(state, **how)
    with pytest.raises(TypeError, match="source must map names to tensors, got 3"):
        vitfast.load({3: torch.ones(2)})


def test_weight_in_two_shards_is_taken_from_the_wrong_one(tmp_path):
    state = timms("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).state_dict()
    names = [*state]
    save_file({name: state[name] for name in names[:10]}, tmp_path / "a.safetensors")
    save_file({name: state[name] + (name in names[:10]) for name in names[8:]}, tmp_path / "b.safetensors")
    index = {name: "a.safetensors" if name in names[:10] else "b.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = vitfast.load(tmp_path).state_dict()
    assert all(torch.equal(found[name], value) for name, value in state.items())
