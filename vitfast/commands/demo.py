"""`vitfast demo`: train a small ViT on real digits, save and reload it, compare it with timm and time both."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vitfast
from vitfast.check import acceptance
from vitfast.commands import info
from vitfast.measure import device as devices
from vitfast.measure import timing
from vitfast.parity.compare import compare, worst_by_kind
from vitfast.parity.stages import stage_values

EXTRAS = ("matplotlib", "sklearn", "timm", "tqdm")
PIP_NAMES = {"sklearn": "scikit-learn"}

DIGITS_NAME = "vit_tiny_patch16_224"
DIGITS_MODEL = {
    "img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 64, "depth": 3, "num_heads": 4,
    "global_pool": "avg",
}  # fmt: skip
LARGE_NAME = "vit_small_patch16_224"
EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 40, 64, 5e-3, 0.05, 0.1
# largest turn (radians), change of size, and shift (of half the image): about 7 degrees, 6 % and a third of a pixel
JITTER = (0.12, 0.06, 0.09)
REQUIRED_ACCURACY = 0.95
SAMPLES = (4, 6)
NEXT_COMMANDS = """\
  vitfast info                                   # what runs each op on this machine, and why
  vitfast models '*dinov2*'                      # which of timm's names work
"""
NEXT_PYTHON = """\
  import torch, vitfast
  model = vitfast.ViT.from_config(vitfast.read_config({path!r}))
  vitfast.load_checkpoint(model, {path!r})
  print(vitfast.explain(model.eval()))
  print(vitfast.prepare(model, dtype="auto")(torch.zeros(1, 1, 8, 8)).softmax(dim=-1))
"""


class DemoError(Exception):
    """The demo cannot run or did not do what it promises; the message is one line for the user."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Digits:
    """scikit-learn's digits, normalised: 8 x 8 pixels, one channel, 80 % to train on and 20 % held out."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass(frozen=True)
class Training:
    """Mean loss and held-out accuracy of each epoch, and what the loop took."""

    loss: list[float]
    accuracy: list[float]
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 where the demo failed, 2 for wrong use or a missing package."""
    parser = argparse.ArgumentParser(
        prog="vitfast demo",
        description="Train a small ViT on scikit-learn's digits, reload it, compare it with timm and time both.",
    )
    parser.add_argument("--output", default="demo_output", help="folder for what is written (default: %(default)s)")
    passes = f"over the images; accuracy is judged from {EPOCHS} on (default: %(default)s)"
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=f"passes {passes}")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order; the split stays (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    arguments = parser.parse_args(argv)
    try:
        run_demo(arguments.output, epochs=arguments.epochs, seed=arguments.seed, device=arguments.device)
    except DemoError as error:
        print(f"vitfast demo: {error}", file=sys.stderr)
        return error.status
    return 0


def run_demo(
    output: str | os.PathLike = "demo_output", *, epochs: int = EPOCHS, seed: int = 0, device: str = "auto"
) -> dict[str, Any]:
    """Run everything, print it, write digits.safetensors, digits.png and summary.json to `output`.

    Returns:
        What summary.json holds.

    Raises:
        DemoError: a package is missing, an argument makes no sense, the accuracy or the parity is not reached, or a
            prepared model is wrong.
    """
    _require_extras()
    if epochs < 1:
        raise DemoError(f"--epochs must be at least 1, got {epochs}", status=2)
    place = _device(device)
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--output {str(folder)!r} cannot be made a folder: {error.strerror}", status=2) from error
    where = conditions(place)
    print(f"{where['device']}, {where['threads']} CPU threads")
    print(", ".join(f"{name} {where[name]}" for name in ("vitfast", "torch", "timm")))

    torch.manual_seed(seed)
    data = load_digits(place)
    model = vitfast.create_model(DIGITS_NAME, **DIGITS_MODEL).to(place)
    print(
        f"\nTraining: {len(data.train_labels)} images of 8 x 8, {len(data.test_labels)} held out, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {epochs} epochs"
    )
    history = train(model, data, epochs)
    checkpoint = folder / "digits.safetensors"
    model = save_and_reload(model, checkpoint, data.test_images)
    predictions = predict(model, data.test_images)
    accuracy = (predictions == data.test_labels).double().mean().item()
    print(f"Trained in {history.seconds:.1f} s. The checkpoint, reloaded, gives bitwise the same logits.")
    # what fewer epochs reach says nothing about the library
    required = REQUIRED_ACCURACY if epochs >= EPOCHS else 0.0
    told = f"at least {required:.0%} expected" if required else f"nothing expected of fewer than {EPOCHS} epochs"
    right = int((predictions == data.test_labels).sum())
    print(f"Held-out accuracy: {accuracy:.2%} ({right}/{len(predictions)}; {told})")

    stages = compare_with_timm(model, data.test_images, seed)
    speed = time_against_timm(model, data, seed)
    picture = folder / "digits.png"
    draw(picture, history, data, predictions, accuracy)
    summary = {
        **where,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy,
        "train_seconds": history.seconds,
        "loss_per_epoch": history.loss,
        "accuracy_per_epoch": history.accuracy,
        "parity": stages,
        "speed": speed,
    }
    report = folder / "summary.json"
    write_whole(report, lambda path: Path(path).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8"))
    print("\nWritten:")
    for path, what in ((checkpoint, "weights"), (picture, "training curve, samples"), (report, "all numbers")):
        print(f"  {path}  ({what})")

    failed = [row for row in stages if not row["passed"]]
    if failed:
        names = ", ".join(f"{row['model']} {row['dtype']} {row['stage']}" for row in failed)
        raise DemoError(f"these stages are further from fp64 than timm's: {names}")
    if accuracy < required:
        raise DemoError(f"held-out accuracy is {accuracy:.2%}, at least {required:.0%} was expected")
    print_next(checkpoint)
    return summary


def print_next(checkpoint: Path) -> None:
    """Commands for a shell, and lines of Python for what was trained."""
    print("\nNext, in a shell:")
    activate = Path(sys.prefix) / "bin/activate"
    if activate.exists() and os.environ.get("VIRTUAL_ENV") != sys.prefix:
        here = activate.relative_to(Path.cwd()) if activate.is_relative_to(Path.cwd()) else activate
        print(f"  source {shlex.quote(str(here))}")
    print(NEXT_COMMANDS, end="")
    print("\nand in Python:")
    print(NEXT_PYTHON.format(path=str(checkpoint)), end="")


def _require_extras() -> None:
    missing = {}
    for name in EXTRAS:
        try:
            importlib.import_module(name)
        except ImportError as error:
            # a package that is there but lacks one of its own names that one
            missing[PIP_NAMES.get(name, name)] = error.name if error.name not in (None, name) else None
    if missing:
        names = ", ".join(name + (f" (it needs {lacks})" if lacks else "") for name, lacks in missing.items())
        raise DemoError(f"{names} cannot be imported; install with: pip install 'vitfast[demo]'", status=2)


def _device(name: str) -> torch.device:
    try:
        return devices.device_named(name)
    except ValueError as error:
        raise DemoError(f"--device: {error}", status=2) from error


def conditions(device: torch.device | str) -> dict[str, Any]:
    """What has to stand next to a time: device, threads, versions."""
    device = torch.device(device)
    facts = info.collect()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else facts["device"]["cpu"]
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "timm": facts["packages"]["timm"],
        "vitfast": facts["vitfast"],
    }


def load_digits(device: torch.device) -> Digits:
    """The 1,797 images, split class by class with a fixed seed, normalised by the training images' statistics."""
    from sklearn import datasets
    from sklearn.model_selection import train_test_split

    raw = datasets.load_digits()
    parts = train_test_split(raw.images, raw.target, test_size=0.2, stratify=raw.target, random_state=0)
    train_images, test_images = (torch.as_tensor(part, dtype=torch.float32)[:, None] / 16 for part in parts[:2])
    train_labels, test_labels = (torch.as_tensor(part, dtype=torch.long) for part in parts[2:])
    mean, std = train_images.mean(), train_images.std()
    tensors = ((train_images - mean) / std, train_labels, (test_images - mean) / std, test_labels)
    return Digits(*(t.to(device) for t in tensors))


def train(model: nn.Module, data: Digits, epochs: int) -> Training:
    """AdamW under a one-cycle schedule. The held-out images are only looked at, nothing is chosen by them."""
    from tqdm import tqdm

    images, labels = data.train_images, data.train_labels
    steps = len(labels) // BATCH
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps, pct_start=0.2)
    losses, accuracies = [], []
    began = time.perf_counter()
    # a log file gets a few lines, a terminal a moving bar
    interval = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=epochs * steps, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for epoch in range(epochs):
            model.train()
            order = torch.randperm(len(labels), device=labels.device)[: steps * BATCH]
            total = torch.zeros((), device=labels.device)
            for batch in order.split(BATCH):
                logits = model(jitter(images[batch]))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach()
                bar.update()
            losses.append(total.item() / steps)
            accuracies.append((predict(model, data.test_images) == data.test_labels).double().mean().item())
            bar.set_description(f"epoch {epoch + 1}/{epochs}", refresh=False)
            bar.set_postfix(loss=f"{losses[-1]:.3f}", accuracy=f"{accuracies[-1]:.1%}", refresh=False)
    return Training(losses, accuracies, time.perf_counter() - began)


def jitter(images: Tensor) -> Tensor:
    """Turn, scale and shift each image a little at random; what comes in from outside is background."""
    turn, size, down, right = (2 * torch.rand(4, len(images), device=images.device) - 1).unbind()
    turn, size = JITTER[0] * turn, 1 + JITTER[1] * size
    cos, sin = size * turn.cos(), size * turn.sin()
    rows = torch.stack([cos, -sin, JITTER[2] * right, sin, cos, JITTER[2] * down], dim=1)
    grid = F.affine_grid(rows.view(-1, 2, 3), list(images.shape), align_corners=False)
    # grid_sample fills with zeros, so the background has to be zero meanwhile
    background = images.amin()
    return F.grid_sample(images - background, grid, align_corners=False) + background


def predict(model: nn.Module, images: Tensor) -> Tensor:
    model.eval()
    with torch.inference_mode():
        return model(images).argmax(dim=1)


def save_and_reload(model: vitfast.ViT, path: Path, images: Tensor) -> vitfast.ViT:
    """Write the weights, read them into a fresh model, return that one.

    Raises:
        RuntimeError: its logits differ in a single bit.
    """
    vitfast.save_checkpoint(model, path)
    fresh = vitfast.ViT.from_config(model.config).to(images.device)
    vitfast.load_checkpoint(fresh, path)
    model.eval(), fresh.eval()
    with torch.inference_mode():
        before, after = model(images), fresh(images)
    if not torch.equal(before, after):
        largest = (before - after).abs().max().item()
        raise RuntimeError(f"save_and_reload: logits of the reloaded model must be equal, they differ by {largest:g}")
    return fresh


def compare_with_timm(model: vitfast.ViT, digits: Tensor, seed: int) -> list[dict[str, Any]]:
    """Print the parity tables of the trained model and of a large one with random weights."""
    generator = torch.Generator().manual_seed(seed)
    large, large_timm = _large_pair(seed, digits.device)
    photos = torch.randn(2, 3, 224, 224, generator=generator).to(digits.device)
    cases = [
        ("digits, trained", model, _timm_twin(DIGITS_NAME, model, **DIGITS_MODEL), digits[:64], False),
        (f"{LARGE_NAME}, random weights", large, large_timm, photos, True),
    ]
    found = []
    print("\nParity: errors against timm in fp64, and next to those of timm itself in the same dtype")
    for title, ours, theirs, images, summarised in cases:
        for dtype in (torch.float32, torch.bfloat16):
            comparison = compare(theirs, ours, images, dtype=dtype)
            rows = comparison.stages
            found += [
                {
                    "model": title,
                    "dtype": comparison.dtype,
                    "stage": row.stage,
                    "passed": row.passed,
                    "max_abs_err": row.inherited.max,
                    "rel_rms_err": row.inherited.relative,
                    "yardsticks": row.inherited.units,
                    "own_yardsticks": row.own.units,
                    "rel_rms_err_fp64": row.formula,
                }
                for row in rows
            ]
            shown = worst_by_kind(rows) if summarised else rows
            which = f", worst of {len(rows)} stages by kind" if summarised else ""
            print(f"\n  {title}, {len(images)} images, {comparison.dtype}{which}")
            print(f"  {'stage':<14} {'max abs':>9} {'rel rms':>9} {'/ timm':>7} {'own':>7}")
            for row in shown:
                error = row.inherited
                print(
                    f"  {row.stage:<14} {error.max:>9.1e} {error.relative:>9.1e} {error.units:>7.2f} "
                    f"{row.own.units:>7.2f}  {'ok' if row.passed else 'FAILED'}"
                )
    return found


def time_against_timm(model: vitfast.ViT, data: Digits, seed: int) -> list[dict[str, Any]]:
    """Print the speed table, fp32: both models' inference, also prepared, and the small one's training step.

    Raises:
        DemoError: a prepared model is less exact than timm's; then it is not timed.
    """
    device = data.test_images.device
    images, labels = data.train_images[:64], data.train_labels[:64]
    small_timm = _timm_twin(DIGITS_NAME, model, **DIGITS_MODEL)
    large, large_timm = _large_pair(seed, device)
    photo = torch.randn(1, 3, 224, 224, device=device)
    cases = [
        ("digits model", 64, "inference", timing.inference, (small_timm, model), (images,)),
        ("digits model", 64, "training step", timing.training_step, (small_timm, model), (images, labels)),
        (LARGE_NAME, 1, "inference", timing.inference, (large_timm, large), (photo,)),
    ]
    found = []
    print(
        f"\nSpeed: {device.type}, fp32, {torch.get_num_threads()} threads; medians of interleaved rounds; a training "
        "step is forward, loss, backward\n  above 1.00 vitfast is faster; (from to) are the quartiles; noise is timm "
        "over timm measured again\n  prepared is what vitfast.prepare makes of the model above it: weights packed, for "
        "inference only"
    )
    print(f"\n  {'model':<22} {'batch':>5} {'mode':<13} {'timm ms':>8} {'vitfast ms':>10} {'ratio':>5}")
    for name, batch, mode, make, (theirs, ours), inputs in cases:
        variants = {"timm": make(theirs, *inputs), "vitfast": make(ours, *inputs)}
        if make is timing.inference and (prepared := prepare_and_judge(ours, theirs, *inputs)) is not None:
            variants["prepared"] = make(prepared, *inputs)
        result = timing.interleaved_medians(variants, device=device, budget_s=4.0)
        unsteady = f", {result.noisy} rounds noisier than {timing.NOISE_LIMIT:.0%}" if result.noisy else ""
        for variant, shown in (("vitfast", mode), ("prepared", "  prepared")):
            if variant not in variants:
                continue
            low, high = result.spread[variant]
            row = {
                "model": name, "batch": batch, "mode": shown.strip(), "dtype": "fp32",
                "timm_ms": result.median_ms["timm"], "vitfast_ms": result.median_ms[variant],
                "ratio": result.ratio[variant], "spread": [low, high], "noise": result.noise,
                "rounds": result.rounds, "noisy_rounds": result.noisy,
            }  # fmt: skip
            about = f"noise {result.noise:.3f}, {result.rounds} rounds{unsteady}"
            if variant == "prepared":
                *_, gain, _ = row["over_model"] = result.ratio_of("vitfast", variant)
                about = f"{gain:.2f} x the model's speed"
            print(
                f"  {name:<22} {batch:>5} {shown:<13} {row['timm_ms']:>8.2f} {row['vitfast_ms']:>10.2f} "
                f"{row['ratio']:>5.2f} ({low:.2f} {high:.2f}), {about}"
            )
            found.append(row)
    return found


def prepare_and_judge(model: vitfast.ViT, timm_model: nn.Module, images: Tensor) -> nn.Module | None:
    """The model prepared, with torch's threads as they are; None, printing why, where `prepare` has no way to.

    Raises:
        DemoError: a stage, or what a call returns, is not right by `acceptance`, next to timm's model.
    """
    try:
        prepared = vitfast.prepare(model.eval(), threads=None)
    except NotImplementedError as reason:
        print(f"  not prepared: {reason}")
        return None
    with torch.inference_mode():
        out = prepared.intermediates(images) | {"call": prepared(images)}
        low = stage_values(timm_model.eval(), images)
        ref = stage_values(copy.deepcopy(timm_model).double(), images.double())
    for taps in (low, ref):
        taps["call"] = taps["logits"]
    try:
        # packed products add up in one chain where timm's add up pieces, so the rule of an op's products applies
        acceptance.accept_stages(out, ref, low, typical=acceptance.RMS_RATIO[images.dtype])
    except acceptance.NotAccepted as fault:
        raise DemoError(f"the prepared model is less exact than timm's: {' '.join(str(fault).split())}") from fault
    return prepared


def _timm_twin(name: str, model: vitfast.ViT, **keywords: Any) -> nn.Module:
    """timm's model with the same weights, on the same device."""
    import timm

    twin = timm.create_model(name, **keywords)
    twin.load_state_dict(model.state_dict(), strict=True)
    return twin.to(next(model.parameters()).device)


def _large_pair(seed: int, device: torch.device) -> tuple[vitfast.ViT, nn.Module]:
    torch.manual_seed(seed)
    model = vitfast.create_model(LARGE_NAME).to(device)
    return model, _timm_twin(LARGE_NAME, model)


def draw(path: Path, history: Training, data: Digits, predictions: Tensor, accuracy: float) -> None:
    """Left the training curve, right held-out digits with what was predicted; wrong ones stand first, in red."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.15))
    epochs = range(1, len(history.loss) + 1)
    axes = left.subplots()
    (loss_line,) = axes.plot(epochs, history.loss, color="tab:blue", label="training loss")
    axes.set(xlabel="epoch", ylabel="training loss (cross-entropy, smoothed labels)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    percent = axes.twinx()
    values = [100 * value for value in history.accuracy]
    (accuracy_line,) = percent.plot(epochs, values, color="tab:orange", label="held-out accuracy")
    percent.set(ylabel="held-out accuracy (%)", ylim=(0, 100))
    axes.legend(handles=[loss_line, accuracy_line], loc="center right")
    axes.set_title(f"ViT on digits: {accuracy:.2%} of {len(predictions)} held-out images")

    images, labels, predictions = data.test_images[:, 0].cpu().numpy(), data.test_labels.tolist(), predictions.tolist()
    wrong = [i for i, label in enumerate(labels) if predictions[i] != label]
    correct = [i for i, label in enumerate(labels) if predictions[i] == label]
    # at most half the grid, so that the picture shows what the model gets right as well
    cells = SAMPLES[0] * SAMPLES[1]
    shown = wrong[: cells // 2]
    shown += correct[: cells - len(shown)]
    right.suptitle(f"held-out digits: predicted (true); {len(wrong)} of {len(labels)} are wrong")
    # a list: `flat` is an iterator, which the first loop would use up
    grid = list(right.subplots(*SAMPLES).flat)
    for axes in grid:
        axes.axis("off")
    for axes, i in zip(grid, shown, strict=False):
        hit = predictions[i] == labels[i]
        axes.imshow(images[i], cmap="gray_r")
        axes.set_title(
            f"{predictions[i]} ({labels[i]})" + ("" if hit else " wrong"), color="black" if hit else "red", fontsize=10
        )
    write_whole(path, lambda temporary: figure.savefig(temporary, format="png", dpi=110))


def write_whole(path: Path, write: Callable[[str], Any]) -> None:
    """Let `write` fill a temporary file and put it in `path`'s place only when it is complete."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
