"""What Hugging Face's Trainer and accelerate do to a model, ours beside timm's from the same weights, on digits."""

import copy
import dataclasses
import json

import accelerate
import pytest
import timm
import torch
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.data import DataLoader, TensorDataset
from transformers import Trainer, TrainingArguments

import vitfast
from vitfast.commands.demo import DIGITS_MODEL, DIGITS_NAME, load_digits

# of fp32 losses, which the two add up in another order: 1e-7 was seen; a bf16 logit is good to 4e-3, 1e-4 was seen
CLOSE, CLOSE_IN_BF16 = 2e-6, 5e-4
LIBRARIES = {"timm": timm, "vitfast": vitfast}


@pytest.fixture(scope="module")
def digits():
    """192 rows to train on and 64 held out."""
    data = load_digits(torch.device("cpu"))
    rows = lambda images, labels: [  # noqa: E731
        {"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)
    ]
    return rows(data.train_images[:192], data.train_labels[:192]), rows(data.test_images[:64], data.test_labels[:64])


class Classifier(nn.Module):
    """The usual wrapper: Trainer hands over columns by name and reads the loss from what comes back."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, labels=None):
        logits = self.model(pixel_values)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}

    def gradient_checkpointing_enable(self, **_):
        self.model.set_grad_checkpointing()


def bare_pair(**changes):
    theirs, ours = (lib.create_model(DIGITS_NAME, **DIGITS_MODEL | changes) for lib in LIBRARIES.values())
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def pair():
    return tuple(Classifier(model) for model in bare_pair(drop_path_rate=0.1))


def trainer_of(model, digits, folder, **changes):
    usual = {
        "output_dir": str(folder), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "seed": 1,
        "per_device_train_batch_size": 32, "num_train_epochs": 1, "learning_rate": 1e-3, "logging_steps": 1,
        "eval_strategy": "epoch", "save_strategy": "epoch",
    }  # fmt: skip
    hits = lambda seen: {"accuracy": (seen.predictions.argmax(-1) == seen.label_ids).mean().item()}  # noqa: E731
    arguments = TrainingArguments(**usual | changes)
    return Trainer(model, arguments, train_dataset=digits[0], eval_dataset=digits[1], compute_metrics=hits)


def same_weights(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


HOW = {
    "as it is": {},
    "bf16": {"bf16": True},
    "checkpointing, accumulated": {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
    "clipped, decayed, warmed up": {"max_grad_norm": 0.1, "weight_decay": 0.05, "warmup_steps": 3},
    "batch size found": {"auto_find_batch_size": True, "lr_scheduler_type": "cosine"},
}


@pytest.mark.parametrize("how", HOW)
def test_trainer_learns_other_weights_than_timms(digits, tmp_path, how):
    models = pair()
    trainers = []
    for side, model in zip("ab", models, strict=True):
        trainers.append(trainer_of(model, digits, tmp_path / side, **HOW[how]))
        trainers[-1].train()
    near = lambda values: pytest.approx(values, rel=CLOSE_IN_BF16 if how == "bf16" else CLOSE)  # noqa: E731
    for key in ("loss", "eval_loss"):
        expected = logged(trainers[0], key)
        assert logged(trainers[1], key) == near(expected) and expected
    for key in ("learning_rate", "eval_accuracy"):
        assert logged(trainers[1], key) == logged(trainers[0], key)
    assert logged(trainers[1], "grad_norm") == pytest.approx(logged(trainers[0], "grad_norm"), rel=5e-3)


def test_best_or_resumed_model_of_trainer_is_another(digits, tmp_path):
    """The best checkpoint is put back at the end; a resumed run, to the bit the one without a stop; timm reads both."""
    theirs, ours = pair()
    started = copy.deepcopy(ours)
    how = {"num_train_epochs": 3, "load_best_model_at_end": True, "metric_for_best_model": "eval_accuracy",
           "learning_rate": 5e-3}  # fmt: skip
    whole = trainer_of(ours, digits, tmp_path / "whole", **how)
    whole.train()
    best = whole.state.best_model_checkpoint
    assert whole.evaluate()["eval_accuracy"] == max(logged(whole, "eval_accuracy"))
    saved = load_file(f"{best}/model.safetensors")
    same_weights(saved, ours.state_dict())
    # the last one would be there without any putting back
    assert not best.endswith("checkpoint-18")

    resumed = trainer_of(started, digits, tmp_path / "resumed", **how)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert logged(resumed, "loss")[6:] == logged(whole, "loss")[6:]
    assert logged(resumed, "eval_loss")[1:3] == logged(whole, "eval_loss")[1:3]
    ends = [load_file(tmp_path / run / "checkpoint-18" / "model.safetensors") for run in ("resumed", "whole")]
    same_weights(*ends)

    goes_on = trainer_of(theirs, digits, tmp_path / "theirs", **how)
    goes_on.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert logged(goes_on, "loss")[6:] == pytest.approx(logged(whole, "loss")[6:], rel=1e-4)


@pytest.fixture
def accelerator(request):
    """A fresh one, with no trace of a Trainer before it, and none of it for the tests after."""
    states = AcceleratorState, GradientState, PartialState
    for state in states:
        state._reset_state()
    yield accelerate.Accelerator(cpu=True, mixed_precision=request.param, gradient_accumulation_steps=2)
    for state in states:
        state._reset_state()


@pytest.mark.parametrize("accelerator", ["no", "bf16"], indirect=True)
def test_accelerator_takes_other_steps(digits, tmp_path, accelerator):
    """A loop on `prepare`, `accumulate`, `clip_grad_norm_` and `save_state`; `load_state` goes back to the middle."""
    bf16, runs = accelerator.mixed_precision == "bf16", []
    images, labels = (torch.stack([row[key] for row in digits[0]]) for key in ("pixel_values", "labels"))
    for side, model in zip("ab", bare_pair(drop_path_rate=0.1), strict=True):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=12)
        model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
        losses = []
        for i, (x, y) in enumerate(loader):
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            losses.append(loss.item())
            if i == 3:
                accelerator.save_state(str(tmp_path / side))
                middle = copy.deepcopy(accelerator.unwrap_model(model).state_dict())
        accelerator.load_state(str(tmp_path / side))
        same_weights(model.state_dict(), middle)
        accelerator._models.clear(), accelerator._optimizers.clear(), accelerator._schedulers.clear()
        accelerator._dataloaders.clear()
        losses.append(model(images[:32]).float().square().mean().item())
        runs.append(losses)
    assert runs[1] == pytest.approx(runs[0], rel=CLOSE_IN_BF16 if bf16 else CLOSE)
    ours = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert type(ours) is vitfast.ViT and vitfast.explain(ours).all_fused
    vitfast.save_checkpoint(ours, tmp_path / "ours.safetensors")
    again = vitfast.create_model(DIGITS_NAME, **DIGITS_MODEL, checkpoint_path=tmp_path / "ours.safetensors")
    assert torch.equal(again.eval()(images), ours.eval()(images))


def test_offloaded_weights_are_read_where_they_are_not(digits, tmp_path):
    """`init_empty_weights`, `load_checkpoint_and_dispatch`, `cpu_offload`: hooks bring each module's weights to it."""
    images, (theirs, ours) = torch.stack([row["pixel_values"] for row in digits[1]]), bare_pair()
    vitfast.save_checkpoint(ours, tmp_path / "ours.safetensors")
    with torch.no_grad():
        expected = theirs.eval()(images)
    with accelerate.init_empty_weights():
        empty = vitfast.create_model(DIGITS_NAME, **DIGITS_MODEL)
    assert all(p.is_meta for p in empty.parameters())
    assert list(accelerate.infer_auto_device_map(empty, {"cpu": "1GB"}, no_split_module_classes=["Block"])) == [""]
    file, everything = str(tmp_path / "ours.safetensors"), {"": "cpu"}
    loaded = accelerate.load_checkpoint_and_dispatch(empty, file, device_map=everything).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), expected, rtol=1e-5, atol=1e-5)
        offloaded = accelerate.cpu_offload(loaded, execution_device=torch.device("cpu"))
        assert all(p.is_meta for p in offloaded.parameters())
        torch.testing.assert_close(offloaded(images), expected, rtol=1e-5, atol=1e-5)
    # off again the modules hold a forward that is their class's own
    remove_hook_from_submodules(offloaded)
    assert not any(p.is_meta for p in offloaded.parameters())
    assert vitfast.explain(offloaded).all_fused
    torch.testing.assert_close(vitfast.prepare(offloaded)(images), expected, rtol=1e-5, atol=1e-5)


def test_averaged_model_shares_weights_or_loses_them(digits):
    """torch.optim.swa_utils: a copy that follows, and a pass for batch norms, which there are none of."""
    images = torch.stack([row["pixel_values"] for row in digits[0]])
    outs = []
    for model in bare_pair():
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        for factor in (1.0, 2.0):
            with torch.no_grad():
                model.head.weight.mul_(factor)
            average.update_parameters(model)
        update_bn(DataLoader(images, batch_size=64), average)
        assert not torch.equal(average.module.head.weight, model.head.weight)
        outs.append(average.eval()(images).detach())
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)


def test_bare_model_is_refused_by_trainer(digits, tmp_path):
    """No wrapper: Trainer sets `use_cache` in what a model has as `config`, and callbacks write it as JSON."""
    rows = [{"x": row["pixel_values"], "labels": row["labels"]} for row in digits[0]]
    histories = []
    for side, model in zip(LIBRARIES, bare_pair(), strict=True):
        arguments = TrainingArguments(
            str(tmp_path / side), use_cpu=True, report_to="none", disable_tqdm=True, seed=1, max_steps=6,
            per_device_train_batch_size=32, learning_rate=1e-3, logging_steps=1, label_names=["labels"],
        )  # fmt: skip
        loss = lambda out, labels, num_items_in_batch=None: nn.functional.cross_entropy(out, labels)  # noqa: E731
        trainer = Trainer(model, arguments, train_dataset=rows, compute_loss_func=loss)
        trainer.train()
        histories.append([step["loss"] for step in trainer.state.log_history if "loss" in step])
    assert histories[1] == pytest.approx(histories[0], rel=CLOSE) and len(histories[1]) == 6
    written = json.loads(model.config.to_json_string())
    assert vitfast.ViTConfig(**written) == model.config and not hasattr(model.config, "use_cache")
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.config.depth = 3
