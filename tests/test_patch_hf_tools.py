"""A patched Hugging Face model in the hands of others: Trainer, files, peft, compilers, timm's models inside, and the
families that a patch leaves as they are.
"""

import copy
import json

import peft
import pytest
import torch
import transformers
from hf_pair import KINDS, build, layers_of, ops_in, pair, run, same_gradients
from patch_pair import equal, near, state_of
from safetensors.torch import load_file
from test_ops import Recorder
from transformers import Trainer, TrainingArguments

import vitfast

HOW = {
    "as it is": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_trainer_learns_something_else_or_runs_no_ops(name, how, tmp_path):
    """Trainer hands `num_items_in_batch` to the model, which hands it on to every attention."""
    stock, patched, images = pair(name, massive=False, batch=16)
    rows = [{"pixel_values": image, "labels": i % 10} for i, image in enumerate(images)]
    losses = []
    for model in (stock, patched):
        arguments = TrainingArguments(
            str(tmp_path / str(len(losses))), use_cpu=True, report_to="none", disable_tqdm=True, seed=1, max_steps=2,
            per_device_train_batch_size=4, learning_rate=1e-4, logging_steps=1, save_strategy="no", **HOW[how],
        )  # fmt: skip
        trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4])
        with Recorder() as recorder:
            trainer.train()
        losses.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
        losses[-1].append(trainer.evaluate()["eval_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=2e-2 if how == "bf16" else 1e-4) and len(losses[0]) == 3
    ran = [str(func).split(".")[1] for func, *_ in recorder.calls]
    steps = 4 if how in ("checkpointing", "accumulated") else 2
    assert ran.count("attention") == 2 * steps


@pytest.mark.parametrize("name", ["ViT", "DeiT", "DINOv2 SwiGLU", "registers"])
def test_file_of_a_patched_model_is_another_one(name, tmp_path):
    """Keys or tensors that a patch changes; a checkpoint with the names of before transformers 5 is patched too."""
    stock, patched, images = pair(name, massive=False, train=False)
    for model, side in ((stock, "stock"), (patched, "patched")):
        model.save_pretrained(tmp_path / side)
    files = [load_file(tmp_path / side / "model.safetensors") for side in ("stock", "patched")]
    equal(files[1], files[0])
    configs = [json.loads((tmp_path / side / "config.json").read_text()) for side in ("stock", "patched")]
    assert configs[0] == configs[1]
    # what transformers writes has the old names
    assert any("attention.attention.query" in key for key in files[0])
    read = type(stock).from_pretrained(tmp_path / "patched").eval()
    assert not ops_in(read, images)
    equal(read.state_dict(), stock.state_dict())
    assert not vitfast.patch(read).require(*KINDS).left
    near(read(images).logits, stock(images).logits)
    equal(read(images).logits, patched(images).logits)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("target", ["q_proj", "fc1", "o_proj"])
def test_adapter_is_passed_over(target, before):
    """LoRA leaves a `weight` where it wraps a Linear: the base's."""
    stock, images = build("ViT", massive=False, train=False)
    models = []
    for patches in (False, True):
        model = copy.deepcopy(stock)
        if patches and before:
            vitfast.patch(model)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[target], init_lora_weights=False))
        if patches and not before:
            vitfast.patch(model)
        models.append(model.train())
    (expected, expected_grads), (out, grads) = (run(model, images) for model in models)
    near(out, expected)
    same_gradients(grads, expected_grads)
    assert (stock(images).logits - expected).norm() > 0.01 * expected.norm()
    report = vitfast.patch(models[1])
    assert {part.kind for part in report.left} == {"mlp" if target == "fc1" else "attention"}
    assert target in str(report) and report.require("norm")
    merged = models[1].merge_and_unload()
    near(merged.eval()(images).logits, models[0].eval()(images).logits, 1e-4)
    assert not vitfast.patch(merged).require(*KINDS).left
    assert ops_in(merged, images).count("attention") == 2


@pytest.fixture
def compiler():
    """All models of transformers share a wrapper, which may be compiled eight times."""
    torch.compiler.reset()
    yield torch.compile
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["ViT", "DINOv2 SwiGLU", "ViT eager", "ViT gelu_python", "registers"])
def test_compiled_model_breaks_its_graph_or_computes_otherwise(name, compiler):
    stock, patched, images = pair(name, massive=False)
    compiled = compiler(patched, backend="aot_eager", fullgraph=True)
    (out, grads), (expected, expected_grads) = run(compiled, images), run(stock, images)
    near(out, expected)
    same_gradients({at.removeprefix("_orig_mod."): grad for at, grad in grads.items()}, expected_grads)
    patched.eval()
    with torch.no_grad():
        near(compiled(images).logits, stock.eval()(images).logits)
    vitfast.unpatch(patched)
    with torch.no_grad():
        near(compiled(images).logits, stock(images).logits)


def test_compiled_model_runs_what_it_was(compiler):
    """An implementation, a scale or an activation that is another one since the model was compiled."""
    stock, patched, images = pair("ViT", massive=False, train=False)
    compiled = compiler(patched, backend="eager", fullgraph=True)
    for change in (
        lambda model: model.set_attn_implementation("eager"),
        lambda model: setattr(layers_of(model)[0].attention, "scaling", 0.5),
        lambda model: setattr(layers_of(model)[0].mlp.activation_fn, "act", torch.tanh),
        lambda model: setattr(layers_of(model)[1].mlp, "activation_fn", torch.nn.Tanh()),
    ):
        with torch.no_grad():
            near(compiled(images).logits, stock(images).logits)
        for model in (stock, patched):
            change(model)
    with torch.no_grad():
        near(compiled(images).logits, stock(images).logits)


@pytest.mark.parametrize("kind", ["Model", "ForImageClassification"])
def test_model_of_timm_in_a_wrapper_is_left(kind):
    config = transformers.TimmWrapperConfig(architecture="test_vit", model_args={"img_size": 32}, num_labels=10)
    stock = getattr(transformers, f"TimmWrapper{kind}")(config).eval()
    patched, images = copy.deepcopy(stock), torch.randn(2, 3, 32, 32)
    assert not vitfast.patch(patched).require(*KINDS, "patch_embed").left
    assert ops_in(patched, images).count("attention_qkv") == len(stock.timm_model.blocks)
    for keywords in ({}, {"output_hidden_states": True}):
        found, expected = patched(images, **keywords), stock(images, **keywords)
        assert list(found) == list(expected)
        near(found[0], expected[0])
        for ours, theirs in zip(found.hidden_states or (), expected.hidden_states or (), strict=True):
            near(ours, theirs)


WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
          "image_size": 32, "patch_size": 8}  # fmt: skip
SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "image_size": 32, "patch_size": 4}
LEFT = {
    "DINOv3ViT": ("DINOv3ViTModel", WIDTHS), "CLIPVision": ("CLIPVisionModel", WIDTHS),
    "SiglipVision": ("SiglipVisionModel", WIDTHS), "ViTMAE": ("ViTMAEModel", WIDTHS),
    "ViTMSN": ("ViTMSNModel", WIDTHS), "IJepa": ("IJepaModel", WIDTHS), "Beit": ("BeitModel", WIDTHS),
    "Swin": ("SwinModel", SWIN),
}  # fmt: skip


@pytest.mark.parametrize("family", LEFT)
def test_family_that_is_not_known_is_changed_or_not_named(family):
    kind, sizes = LEFT[family]
    config = getattr(transformers, f"{family}Config")(**sizes)
    model, images = getattr(transformers, kind)(config), torch.randn(2, 3, 32, 32)

    def outputs():
        torch.manual_seed(1)
        return model(images)[0]

    before, expected = state_of(model), outputs()
    report = vitfast.patch(model)
    assert not report.fused and len({part.name for part in report.left}) >= 2
    assert all("which vitfast does not know" in part.reason for part in report.left), report
    for wanted in KINDS:
        with pytest.raises(RuntimeError, match=f"nothing of kind '{wanted}' is fused: .*does not know"):
            report.require(wanted)
    equal(outputs(), expected)
    equal(state_of(model), before)
