"""What Lightning does to a model: fits of a LightningModule round ours, beside one round timm's from the same weights.

One epoch or two over some of scikit-learn's digits.
"""

import copy
import warnings

import lightning as L
import pytest
import timm
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    ModelPruning,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import vitfast
from vitfast.commands.demo import DIGITS_MODEL, DIGITS_NAME, load_digits

# of fp32 losses, which the two add up in another order: 1e-7 was seen; a bf16 logit is good to 4e-3, 1e-4 was seen
CLOSE, CLOSE_IN_BF16 = 2e-6, 5e-4


@pytest.fixture(scope="module")
def digits():
    """256 images to train on in batches of 32, 64 held out."""
    all_digits = load_digits(torch.device("cpu"))
    return (all_digits.train_images[:256], all_digits.train_labels[:256]), (
        all_digits.test_images[:64], all_digits.test_labels[:64],
    )  # fmt: skip


class Classifier(L.LightningModule):
    """The usual one: a model by the name of its library, hyperparameters kept, data from its own loaders."""

    def __init__(self, library, lr=1e-3, batch_size=32, drop_path=0.1, shuffle=True, compiled=False):
        super().__init__()
        self.save_hyperparameters()
        model = {"timm": timm, "vitfast": vitfast}[library].create_model(
            DIGITS_NAME, drop_path_rate=drop_path, **DIGITS_MODEL
        )
        self.model = torch.compile(model, backend="aot_eager") if compiled else model
        self.losses, self.data = [], None

    def forward(self, images):
        return self.model(images)

    def step(self, batch, name):
        images, labels = batch
        loss = torch.nn.functional.cross_entropy(self(images), labels)
        self.log(name, loss)
        return loss

    def training_step(self, batch, _):
        loss = self.step(batch, "train_loss")
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.step(batch, "val_loss")

    def predict_step(self, batch, _):
        return self(batch[0])

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    def train_dataloader(self):
        data, size = TensorDataset(*self.data[0]), self.hparams.batch_size
        if torch.distributed.is_initialized():
            # each process every second image: Lightning's own sampler shuffles them
            return DataLoader(data, batch_size=size, sampler=DistributedSampler(data, shuffle=False))
        return DataLoader(data, batch_size=size, shuffle=self.hparams.shuffle)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*self.data[1]), batch_size=64)

    predict_dataloader = val_dataloader


def pair(digits, **changes):
    """A module round timm's model and one round ours, with the same weights."""
    theirs, ours = Classifier("timm", **changes), Classifier("vitfast", **changes)
    ours.load_state_dict(theirs.state_dict())
    theirs.data = ours.data = digits
    return theirs, ours


def fit(module, folder, ckpt_path=None, **changes):
    """The trainer after its fit, which draws the same order and drop path for every model."""
    torch.manual_seed(1)
    trainer = trainer_of(folder, **changes)
    trainer.fit(module, ckpt_path=ckpt_path)
    return trainer


def trainer_of(folder, **changes):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    usual = {"max_epochs": 1, "accelerator": "cpu", "default_root_dir": folder, "enable_checkpointing": False}
    return L.Trainer(**usual | quiet | changes)


def same_weights(found, expected, tolerance=0.0):
    for (key, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert (one - other).norm() <= tolerance * other.norm(), key


HOW = {
    "as it is": {},
    "deterministic": {"deterministic": True, "detect_anomaly": True},
    "accumulated, clipped": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
    "bf16, accumulated, clipped": {"precision": "bf16-mixed", "accumulate_grad_batches": 3, "gradient_clip_val": 0.1},
    "weights in bf16": {"precision": "bf16-true"},
    "fp64": {"precision": "64-true"},
}


@pytest.mark.parametrize("how", HOW)
def test_fit_learns_other_weights_than_timms(digits, tmp_path, how):
    modules = pair(digits)
    trainers = [fit(module, tmp_path, **HOW[how]) for module in modules]
    tolerance = CLOSE_IN_BF16 if "bf16" in how else CLOSE
    assert len(modules[1].losses) == 8
    assert modules[1].losses == pytest.approx(modules[0].losses, rel=tolerance)
    held_out = [trainer.callback_metrics["val_loss"].item() for trainer in trainers]
    assert held_out[1] == pytest.approx(held_out[0], rel=tolerance)
    assert next(modules[1].parameters()).dtype is next(modules[0].parameters()).dtype


@pytest.mark.slow
@pytest.mark.full
def test_compiled_model_learns_other_weights_than_timms(digits, tmp_path):
    modules = pair(digits, compiled=True)
    for module in modules:
        fit(module, tmp_path, limit_train_batches=3)
    assert modules[1].losses == pytest.approx(modules[0].losses, rel=CLOSE)


def test_checkpoint_of_a_fit_gives_another_model(digits, tmp_path):
    """The best of three epochs by its file, with hyperparameters; a resumed run, to the bit the one without a stop."""
    _, ours = pair(digits, shuffle=False)
    start = copy.deepcopy(ours.state_dict())
    keep = ModelCheckpoint(tmp_path / "kept", "{epoch}", monitor="val_loss", save_top_k=2, save_last=True)
    trainer = fit(ours, tmp_path, max_epochs=3, callbacks=[SeedByStep(), keep], enable_checkpointing=True)
    assert len(keep.best_k_models) == 2 and (tmp_path / "kept" / "last.ckpt").is_file()
    best = Classifier.load_from_checkpoint(keep.best_model_path, weights_only=True)
    assert best.hparams == ours.hparams
    best.data = digits
    (found,) = trainer.validate(best, verbose=False)
    assert found["val_loss"] == pytest.approx(keep.best_model_score.item(), rel=CLOSE)
    last = Classifier.load_from_checkpoint(tmp_path / "kept" / "last.ckpt")
    same_weights(last, ours)

    stopped = Classifier("vitfast", shuffle=False)
    stopped.load_state_dict(start)
    stopped.data = digits
    trainer = fit(stopped, tmp_path, callbacks=[SeedByStep()])
    trainer.save_checkpoint(tmp_path / "stopped.ckpt")
    resumed = Classifier("vitfast", shuffle=False)
    resumed.data = digits
    trainer = fit(resumed, tmp_path, tmp_path / "stopped.ckpt", max_epochs=3, callbacks=[SeedByStep()])
    assert trainer.current_epoch == 3 and resumed.losses == ours.losses[8:]
    same_weights(resumed, ours)


class SeedByStep(L.Callback):
    """A checkpoint holds no generator: a step's draws have to be its own for a resumed run to repeat them."""

    def on_train_batch_start(self, trainer, *_):
        torch.manual_seed(trainer.global_step)


def test_checkpoint_of_timms_fit_does_not_go_on_as_ours(digits, tmp_path):
    """Weights, moments and schedule of a run that began with timm's model; the next epoch is timm's."""
    theirs, ours = pair(digits)
    fit(theirs, tmp_path).save_checkpoint(tmp_path / "theirs.ckpt")
    goes_on = copy.deepcopy(theirs)
    for module in (goes_on, ours):
        module.losses.clear()
        fit(module, tmp_path, tmp_path / "theirs.ckpt", max_epochs=2)
    assert len(ours.losses) == 8 and ours.losses == pytest.approx(goes_on.losses, rel=CLOSE)


AVERAGED = {
    "swa": lambda: StochasticWeightAveraging(1e-3, swa_epoch_start=1, annealing_epochs=1),
    "ema": lambda: EMAWeightAveraging(decay=0.7),
}


@pytest.mark.parametrize("kind", AVERAGED)
def test_averaged_weights_are_not_timms(digits, tmp_path, kind):
    """A copy that shares weights, or is left out where the averages are put into the model at the end."""
    theirs, ours = pair(digits)
    for module in (theirs, ours):
        fit(module, tmp_path, max_epochs=3, callbacks=[AVERAGED[kind]()])
    plain = pair(digits)[1]
    fit(plain, tmp_path, max_epochs=3)
    # the bias of k has no gradient but rounding, which AdamW steps along: 1e-4 was seen there
    same_weights(ours, theirs, 1e-3)
    with pytest.raises(AssertionError):
        same_weights(plain, theirs, 5e-3)
    losses = [trainer_of(tmp_path).validate(module, verbose=False)[0]["val_loss"] for module in (theirs, ours)]
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE)


def test_pruned_weights_are_forgotten(digits, tmp_path):
    """torch's pruning puts a mask and the old weight where a parameter was: a path of ours that reads the old one."""
    theirs, ours = pair(digits)
    for module in (theirs, ours):
        parts = [(block.mlp.fc1, "weight") for block in module.model.blocks]
        prune = ModelPruning("l1_unstructured", parameters_to_prune=parts, amount=0.5)
        fit(module, tmp_path, max_epochs=2, callbacks=[prune])
    assert ours.losses == pytest.approx(theirs.losses, rel=CLOSE)
    assert (ours.model.blocks[0].mlp.fc1.weight == 0).float().mean() > 0.7


def test_tuner_or_summary_finds_another_model(digits, tmp_path):
    """Rates tried and batch sizes, after which weights and optimizer are put back; parameters and shapes by name."""
    found = []
    for module in pair(digits):
        before = copy.deepcopy(module.state_dict())
        torch.manual_seed(1)
        tuner = Tuner(trainer_of(tmp_path))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rates = tuner.lr_find(module, num_training=12, update_attr=False)
            size = tuner.scale_batch_size(module, max_trials=2, init_val=16)
        assert all(map(torch.equal, module.state_dict().values(), before.values()))
        module.example_input_array = digits[0][0][:2]
        summary = L.pytorch.utilities.model_summary.summarize(module, max_depth=2)
        # timm's has a module for dropping patches, which does nothing here
        rows = dict(zip(summary.layer_names, zip(summary.param_nums, summary.out_sizes, strict=True), strict=True))
        rows.pop("model.patch_drop", None)
        found.append((size, rates.results["lr"], summary.total_parameters, rates.results["loss"], rows))
    assert found[1][:3] == found[0][:3] and found[0][0] == 32
    assert found[1][3] == pytest.approx(found[0][3], rel=1e-5)
    assert found[1][4] == found[0][4]


def test_prediction_or_trace_differs_from_timms(digits, tmp_path):
    theirs, ours = pair(digits)
    found = [torch.cat(trainer_of(tmp_path).predict(module)) for module in (theirs, ours)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    traced = ours.to_torchscript(method="trace", example_inputs=digits[1][0][:2])
    torch.testing.assert_close(traced(digits[1][0]), found[0], rtol=1e-5, atol=1e-5)


def test_fabric_takes_other_steps(digits, tmp_path):
    """Lightning without a Trainer: wrapped model and optimizer, a method marked as forward, state saved and read."""
    results = []
    for module in pair(digits):
        torch.manual_seed(1)
        fabric = L.Fabric(accelerator="cpu", precision="bf16-mixed")
        model, optimizer = fabric.setup(module.model, torch.optim.AdamW(module.model.parameters(), lr=1e-3))
        model.mark_forward_method("forward_features")
        losses, (images, labels) = [], digits[0]
        for part in range(4):
            if part == 2:
                fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images[:32]), labels[:32])
            loss = loss + 1e-3 * model.forward_features(images[:32]).float().square().mean()
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            losses.append(loss.item())
        fabric.load(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
        results.append([*losses, model.eval()(images).square().mean().item()])
    assert results[1] == pytest.approx(results[0], rel=5e-3)


@pytest.mark.slow
@pytest.mark.full
def test_two_processes_of_a_fit_hang_or_part(digits, tmp_path):
    """`ddp_spawn`: the module goes to two processes; what comes back is what one process learns from both halves."""
    _, alone = pair(digits, drop_path=0.0, shuffle=False)
    both = Classifier("vitfast", drop_path=0.0, shuffle=False, batch_size=16)
    both.load_state_dict(alone.state_dict())
    both.data = digits
    started = copy.deepcopy(both.state_dict())
    fit(alone, tmp_path, limit_train_batches=4)
    two = {"strategy": "ddp_spawn", "devices": 2, "use_distributed_sampler": False}
    fit(both, tmp_path, limit_train_batches=4, **two)
    moved = max((alone.state_dict()[key] - value).norm() for key, value in started.items())
    assert moved > 0.1
    same_weights(both, alone, 1e-3)
