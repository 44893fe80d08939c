"""timm's train.py, validate.py, inference.py, benchmark.py and onnx_export.py: their calls, in their order, our model.

Each run goes beside timm's own model from the same weights, seed and images, drop path and dropout with the same draws.
"""

import argparse
import copy

import numpy as np
import onnxruntime
import pytest
import timm
import torch
from pairwise import product
from PIL import Image
from sklearn.datasets import load_digits
from timm.data import (
    FastCollateMixup,
    Mixup,
    create_dataset,
    create_loader,
    resolve_data_config,
    resolve_model_data_config,
)
from timm.layers import apply_test_time_pool
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import load_checkpoint, model_parameters
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.task import (
    ClassificationTask,
    FeatureDistillationTask,
    LogitDistillationTask,
    TokenDistillationTask,
    load_task_ema_checkpoint,
    resume_task_checkpoint,
)
from timm.utils.model import avg_ch_var, extract_spp_stats
from timm.utils.onnx import onnx_export

import vitfast

# timm's name, and what makes it small
MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32}),
    "distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 32}),
    "registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 28, "init_values": 0.1}),
}
SMALL = {"depth": 2, "embed_dim": 96, "num_heads": 3, "num_classes": 10}
every_model = pytest.mark.parametrize("name", MODELS)
# of losses in fp32, which the two add up in another order: 2e-7 was seen, an fp32 number's last bit or two
CLOSE = 2e-6
# Muon orthogonalises its steps in bf16, where a last bit turns (2e-6 was seen); a bf16 logit is good to 4e-3
TOLERANCE = {"muon": 2e-5, "bf16": 5e-3}


def pair(name="vit", **changes):
    """timm's model and ours as the scripts make them, with the same weights."""
    timm_name, keywords = MODELS[name]
    # train.py hands on all that these stand for, most of it as None
    given = {"pretrained": False, "in_chans": 3, "scriptable": False, "checkpoint_path": "", "global_pool": None}
    given |= {"drop_block_rate": None, "bn_momentum": None, "bn_eps": None} | SMALL | keywords | changes
    theirs, ours = timm.create_model(timm_name, **given), vitfast.create_model(timm_name, **given)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scikit-learn's digits as PNG files in a folder for each class, 96 to train on and 40 to look at."""
    root, digits = tmp_path_factory.mktemp("digits"), load_digits()
    for i, (image, label) in enumerate(zip(digits.images[:136], digits.target[:136], strict=True)):
        place = root / ("train" if i < 96 else "validation") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image * 255 / 16).astype(np.uint8)).resize((32, 32)).convert("RGB").save(place / f"{i}.png")
    return root


def loader_of(folder, split, config, **how):
    training = split == "train"
    dataset = create_dataset("", root=folder, split=split, is_training=training, batch_size=16)
    how = {"batch_size": 16, "use_prefetcher": False, "num_workers": 0, "device": torch.device("cpu")} | how
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    return create_loader(dataset, is_training=training, **{key: config[key] for key in keys}, **how)


class Script:
    """What train.py holds while it trains: the calls are in its order."""

    def __init__(self, model, folder, out, *, resume=None, epochs=2, clip=("norm", 1.0), amp=None, scaler=False,
                 checkpointing=False, accumulate=1, mixup="mixup", optimizer=None, task=ClassificationTask,
                 **for_task):  # fmt: skip
        timm.utils.random_seed(7, 0)
        if checkpointing:
            model.set_grad_checkpointing(enable=True)
        config = resolve_data_config({"img_size": model.patch_embed.img_size[0]}, model=model)
        model.to(device=torch.device("cpu"), dtype=None)
        self.amp, self.clip, self.epochs, self.accumulate = amp, clip, epochs, accumulate
        self.scaler = timm.utils.NativeScaler(device="cpu") if scaler else None
        mixing = dict(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
        # with the loader that fetches ahead the images are mixed while they are collated
        ahead = mixup == "ahead"
        self.mixup = Mixup(**mixing) if mixup == "mixup" else None
        self.train_loader = loader_of(
            folder, "train", config, re_prob=0.25, hflip=0.5, color_jitter=0.4,
            use_prefetcher=ahead, collate_fn=FastCollateMixup(**mixing) if ahead else None,
        )  # fmt: skip
        self.eval_loader = loader_of(folder, "validation", config, use_prefetcher=ahead)
        criterion = SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(0.1)
        who = {"model": model} if task is ClassificationTask else {"student_model": model}
        self.task = task(**who, criterion=criterion, device=torch.device("cpu"), verbose=False, **for_task)
        module = self.task.get_trainable_module()
        how = optimizer or {"opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "layer_decay": 0.75}
        self.optimizer = create_optimizer_v2(module, **how)
        self.start = 0
        if resume:
            self.start = resume_task_checkpoint(self.task, resume, optimizer=self.optimizer, loss_scaler=self.scaler,
                                                log_info=False)  # fmt: skip
        self.task.setup_ema(decay=0.9, use_warmup=True)
        if resume:
            load_task_ema_checkpoint(self.task, resume)
        out.mkdir(exist_ok=True)
        self.saver = timm.utils.CheckpointSaver(
            model=module, optimizer=self.optimizer, args=argparse.Namespace(model="vit"), amp_scaler=self.scaler,
            checkpoint_dir=out, recovery_dir=out, max_history=2, task=self.task,
        )  # fmt: skip
        self.updates = -(-len(self.train_loader) // accumulate)
        self.schedule, _ = create_scheduler_v2(self.optimizer, sched="cosine", num_epochs=epochs, warmup_lr=1e-5,
                                               warmup_epochs=1, min_lr=1e-6, step_on_epochs=False,
                                               updates_per_epoch=self.updates)  # fmt: skip
        if self.start:
            self.schedule.step_update(self.start * self.updates)
        self.losses, self.metrics = [], []

    def run(self, until=None):
        for epoch in range(self.start, until or self.epochs):
            # of an epoch its own, so that a resumed run sees what the one without a stop saw
            timm.utils.random_seed(epoch, 0)
            self.train_one_epoch(epoch)
            models = [self.task.get_eval_model(ema=ema) for ema in (False, True)]
            self.metrics.append([validate(model, self.eval_loader) for model in models])
            self.saver.save_checkpoint(epoch, metric=self.metrics[-1][0][1])
            self.schedule.step(epoch + 1, self.metrics[-1][0][1])
        return self

    def train_one_epoch(self, epoch):
        self.task.get_trainable_module().train()
        self.optimizer.zero_grad()
        update = epoch * self.updates
        for i, (images, labels) in enumerate(self.train_loader):
            needed = (i + 1) % self.accumulate == 0 or i + 1 == len(self.train_loader)
            if self.mixup is not None:
                images, labels = self.mixup(images, labels)
            with torch.autocast("cpu", dtype=self.amp or torch.bfloat16, enabled=self.amp is not None):
                loss = self.task(images, labels)["loss"] / self.accumulate
            self.losses.append(loss.item() * self.accumulate)
            mode, value = self.clip
            clipped = self.task.get_clip_parameters(exclude_head=mode == "agc")
            if self.scaler is not None:
                self.scaler(loss, self.optimizer, clip_grad=value, clip_mode=mode, parameters=clipped,
                            need_update=needed)  # fmt: skip
            else:
                loss.backward()
                if needed:
                    timm.utils.dispatch_clip_grad(clipped, value=value, mode=mode)
                    self.optimizer.step()
            if needed:
                update += 1
                self.optimizer.zero_grad()
                self.task.update_ema(step=update)
                self.schedule.step_update(num_updates=update)
            if i == 1:
                self.saver.save_recovery(epoch, batch_idx=i)


@torch.inference_mode()
def validate(model, loader, dtype=torch.float32):
    """(mean loss, top-1 accuracy, top-5 accuracy), as both scripts count them."""
    meters, model = [timm.utils.AverageMeter() for _ in range(3)], model.eval()
    for images, labels in loader:
        logits = model(images.to(dtype)).float()
        found = torch.nn.functional.cross_entropy(logits, labels), *timm.utils.accuracy(logits, labels, topk=(1, 5))
        for meter, value in zip(meters, found, strict=True):
            meter.update(value.item(), len(labels))
    return [meter.avg for meter in meters]


HOW = {
    "as it is": {},
    "collated ahead, checkpointing": {"mixup": "ahead", "checkpointing": True},
    "value, accumulated, no mixing": {"clip": ("value", 0.05), "accumulate": 4, "mixup": None},
    "agc, lamb": {"clip": ("agc", 0.02), "optimizer": {"opt": "lamb", "lr": 5e-3, "weight_decay": 0.02}},
    "muon": {"optimizer": {"opt": "muon", "lr": 1e-3, "weight_decay": 0.05}},
    "scaled loss": {"scaler": True},
    "bf16": {"amp": torch.bfloat16, "checkpointing": True},
}
RUNS = [("vit", how) for how in HOW]
RUNS += [(name, how) for name in ("distilled", "registers") for how in ("as it is", "bf16")]


@pytest.mark.parametrize(("name", "how"), RUNS)
def test_train_script_trains_another_model(folder, tmp_path, name, how):
    """Losses, validation with and without averaging, learning rates: of every step of two epochs, timm's."""
    runs = [
        Script(model, folder, tmp_path / side, **HOW[how]).run()
        for side, model in zip("ab", pair(name, drop_path_rate=0.2, drop_rate=0.1), strict=True)
    ]
    near = lambda value: pytest.approx(value, rel=TOLERANCE.get(how, CLOSE))  # noqa: E731
    assert runs[1].losses == near(runs[0].losses)
    rates = [[group["lr"] for group in run.optimizer.param_groups] for run in runs]
    assert rates[1] == rates[0]
    for found, expected in zip(runs[1].metrics, runs[0].metrics, strict=True):
        assert [loss for loss, *_ in found] == near([loss for loss, *_ in expected])
        if how != "bf16":
            assert [accuracies for _, *accuracies in found] == [accuracies for _, *accuracies in expected]


@pytest.mark.parametrize("scaler", [False, True], ids=["", "scaled loss"])
@every_model
def test_resumed_run_ends_elsewhere(folder, tmp_path, name, scaler):
    """Weights, averages, optimizer and scaler after a stop are those of a run without one; files are timm's too."""
    theirs, ours = pair(name, drop_path_rate=0.2)
    stopped, other, started = copy.deepcopy(ours), copy.deepcopy(theirs), ours.state_dict()
    whole = Script(ours, folder, tmp_path / "whole", scaler=scaler, checkpointing=True).run()
    Script(stopped, folder, tmp_path / "first", scaler=scaler, checkpointing=True).run(until=1)
    fresh = copy.deepcopy(stopped)
    for p in fresh.parameters():
        torch.nn.init.zeros_(p)
    written = tmp_path / "first" / "last.pth.tar"
    resumed = Script(fresh, folder, tmp_path / "second", resume=written, scaler=scaler, checkpointing=True).run()
    assert resumed.start == 1 and resumed.losses == whole.losses[6:] and resumed.metrics == whole.metrics[1:]
    for ema in (False, True):
        for (key, found), expected in zip(
            resumed.task.get_eval_model(ema=ema).state_dict().items(),
            whole.task.get_eval_model(ema=ema).state_dict().values(),
            strict=True,
        ):
            assert torch.equal(found, expected), (key, ema)
    moments = [state["exp_avg_sq"] for state in resumed.optimizer.state_dict()["state"].values()]
    for found, state in zip(moments, whole.optimizer.state_dict()["state"].values(), strict=True):
        assert torch.equal(found, state["exp_avg_sq"])
    if scaler:
        assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    # what ours wrote goes on as timm's model, and the recovery file is a checkpoint as well
    continued = Script(other, folder, tmp_path / "theirs", resume=written, scaler=scaler).run()
    assert continued.losses == pytest.approx(whole.losses[6:], rel=CLOSE)
    recovery = tmp_path / "whole" / "recovery-1-1.pth.tar"
    for use_ema in (True, False):
        load_checkpoint(theirs, str(recovery), use_ema=use_ema)
        load_checkpoint(fresh, str(recovery), use_ema=use_ema)
        assert all(map(torch.equal, theirs.state_dict().values(), fresh.state_dict().values()))
    assert not torch.equal(fresh.head.weight, started["head.weight"])


@pytest.mark.parametrize("task", [LogitDistillationTask, FeatureDistillationTask, TokenDistillationTask])
@pytest.mark.parametrize("taught_by", ["theirs", "ours"])
def test_distillation_task_gets_another_teacher_or_student(folder, tmp_path, task, taught_by):
    """`--kd-distill-type`: logits, features of another width, both heads of the student; normalisation of each."""
    teachers = pair("registers", img_size=32, patch_size=16, embed_dim=192)
    teacher = teachers[taught_by == "ours"]
    students = pair("distilled" if task is TokenDistillationTask else "vit", drop_path_rate=0.2)
    losses = []
    for side, student in zip("ab", students, strict=True):
        how = {"epochs": 1, "task": task, "teacher_model": teacher, "distill_loss_weight": 2.0}
        losses.append(Script(student, folder, tmp_path / side, **how).run().losses)
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE)
    assert teacher.training is False and all(p.grad is None for p in teacher.parameters())


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["", "channels_last"])
def test_validate_script_counts_other_hits(folder, name, dtype, channels_last):
    """--checkpoint, --reparam, --test-pool, --model-dtype, --channels-last, --use-train-size."""
    results = []
    for model in pair(name):
        config = resolve_data_config({}, model=model, use_test_size=True, verbose=True)
        assert config == resolve_model_data_config(model, use_test_size=True)
        parameters = sum(p.numel() for p in model.parameters())
        model = timm.utils.reparameterize_model(model)
        model, pooled = apply_test_time_pool(model, config)
        model = model.to(device=torch.device("cpu"), dtype=dtype)
        if channels_last:
            model = model.to(memory_format=torch.channels_last)
        size = {"input_size": (3, *model.patch_embed.img_size)}
        loader = loader_of(folder, "validation", config | size, crop_mode=config["crop_mode"])
        results.append((parameters, pooled, config, validate(model, loader, dtype)))
    assert results[1][:3] == results[0][:3]
    assert results[1][3] == pytest.approx(results[0][3], rel=CLOSE if dtype is torch.float32 else 5e-3)


@every_model
def test_inference_script_names_other_classes(folder, tmp_path, name):
    """`--checkpoint`, prefetching, the five most likely classes with their probabilities."""
    theirs, ours = pair(name)
    path = tmp_path / "weights.safetensors"
    vitfast.save_checkpoint(ours, path)
    timm_name, keywords = MODELS[name]
    found = []
    for create in (timm.create_model, vitfast.create_model):
        model = create(timm_name, in_chans=3, pretrained=False, checkpoint_path=str(path), **SMALL | keywords).eval()
        config = resolve_data_config({"img_size": keywords["img_size"]}, model=model)
        loader = loader_of(folder, "validation", config, crop_mode=config["crop_mode"], use_prefetcher=True)
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=False):
            found.append(torch.cat([model(images).softmax(-1) for images, _ in loader]).topk(min(5, model.num_classes)))
    assert torch.equal(found[1].indices, found[0].indices)
    torch.testing.assert_close(found[1].values, found[0].values, rtol=CLOSE, atol=1e-7)


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "amp_bfloat16": None, "float16": torch.float16}


@every_model
@pytest.mark.parametrize("precision", PRECISIONS)
def test_benchmark_script_takes_other_steps(name, precision):
    """Its inference and training steps, moved and laid out in one call, with the batch size tried downwards."""
    dtype, outs, weights = PRECISIONS[precision], [], []
    for model in pair(name):
        timm.utils.set_jit_fuser("te")
        model.to(device="cpu", dtype=dtype, memory_format=torch.channels_last)
        size = (3, *model.patch_embed.img_size)
        assert resolve_data_config({"input_size": size}, model=model)["input_size"] == size
        batch, said = 16, None
        while batch:
            timm.utils.random_seed(batch)
            images = torch.randn((batch, *size), dtype=dtype).contiguous(memory_format=torch.channels_last)
            try:
                if batch > 8:
                    images = images[:, :1]
                with torch.inference_mode(), torch.autocast("cpu", enabled=dtype is None):
                    outs.append(model.eval()(images))
                break
            except (RuntimeError, ValueError) as error:
                said = str(error)
                assert timm.utils.check_batch_size_retry(said)
            batch = timm.utils.decay_batch_step(batch)
        assert batch == 8 and said
        optimizer = create_optimizer_v2(model.train(), opt="sgd", lr=1e-2)
        model.set_grad_checkpointing()
        for _ in range(3):
            optimizer.zero_grad()
            labels = torch.empty(batch, dtype=torch.long).random_(model.num_classes)
            with torch.autocast("cpu", enabled=dtype is None):
                loss = torch.nn.functional.cross_entropy(model(images), labels)
                loss.backward()
            optimizer.step()
        weights.append((loss.float().detach(), model.head.weight.detach().float()))
    tolerance = CLOSE if precision == "float32" else 2e-2
    for found, expected in [(outs[1], outs[0]), *zip(weights[1], weights[0], strict=True)]:
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert (found - expected).norm() <= tolerance * expected.norm()


@product(name=tuple(MODELS), dynamo={"traced": False, "dynamo": True}, strength=1)
def test_onnx_export_script_writes_another_network(tmp_path, name, dynamo):
    """Both of its exporters; the file runs at a batch size that the export did not see."""
    theirs, ours = pair(name, exportable=True)
    path, size = tmp_path / "model.onnx", (3, *ours.patch_embed.img_size)
    onnx_export(ours, str(path), check=True, check_forward=True, use_dynamo=dynamo, input_size=size, batch_size=2)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = torch.randn(3, *size)
    (found,) = session.run(["output0"], {"input0": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_helpers_for_models_do_not_know_ours():
    """timm.utils.model: unwrapping, freezing and thawing, statistics of activations; heads left out of clipping."""
    theirs, ours = pair("registers")
    wrapped = torch.nn.DataParallel(ours)
    assert timm.utils.unwrap_model(wrapped) is ours
    assert list(timm.utils.get_state_dict(wrapped)) == list(theirs.state_dict())
    left_out = {id(p) for p in ours.parameters()} - {id(p) for p in model_parameters(ours, exclude_head=True)}
    assert left_out == {id(p) for p in ours.head.parameters()}
    for model in (theirs, ours):
        timm.utils.freeze(model, ["patch_embed", "blocks.0"])
        timm.utils.unfreeze(model, ["blocks.0.mlp"])
    assert [p.requires_grad for p in ours.parameters()] == [p.requires_grad for p in theirs.parameters()]
    stats = []
    for model in (theirs, ours):
        torch.manual_seed(0)
        seen = extract_spp_stats(model.eval(), ["patch_embed.proj"], [avg_ch_var], [4, 3, 28, 28])
        stats.append(seen["avg_ch_var"])
    assert stats[1] == pytest.approx(stats[0], rel=CLOSE) and len(stats[1]) == 1


@torch.no_grad()
def test_extracted_attention_is_another():
    """timm.utils.AttentionExtract on hooks: it looks at the dropout of the attention weights."""
    theirs, ours = pair("vit")
    images = torch.randn(2, 3, 32, 32)
    for block in theirs.blocks:
        block.attn.fused_attn = False
    maps = [timm.utils.AttentionExtract(model, method="hook")(images) for model in (theirs, ours)]
    assert list(maps[1]) == list(maps[0]) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    for found, expected in zip(maps[1].values(), maps[0].values(), strict=True):
        assert found.shape == expected.shape == (2, 3, 5, 5)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_images_of_scheduled_sizes_train_another_model(folder):
    """`--train-img-sizes`: batches of 32 and of 48 pixels in turn, positions resampled in training."""
    losses = []
    for model in pair("vit", dynamic_img_size=True, drop_path_rate=0.2):
        timm.utils.random_seed(7)
        config = resolve_data_config({"img_size": 32}, model=model)
        loader = loader_of(folder, "train", config, input_size_choices=[32, 48], batch_size_choices=[16, 8])
        # not AdamW, which makes whole steps of what rounding leaves of gradients that are zero
        optimizer = create_optimizer_v2(model.train(), opt="sgd", lr=0.01)
        losses.append([])
        for images, labels in loader:
            optimizer.zero_grad()
            loss = LabelSmoothingCrossEntropy(0.1)(model(images), labels)
            loss.backward()
            optimizer.step()
            losses[-1].append((images.shape[-1], loss.item()))
    sizes, found = zip(*losses[1], strict=True)
    assert set(sizes) == {32, 48} and sizes == tuple(size for size, _ in losses[0])
    assert found == pytest.approx([loss for _, loss in losses[0]], rel=CLOSE)
