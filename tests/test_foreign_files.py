"""Files that other libraries write of a model: what of them is not read, read wrongly, or refused without a way on."""

import tarfile
import threading
import warnings
import zipfile
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator
from foreign_files import NAME, SMALL, CfgNode, Recipe, Stage, assert_loaded, build, read, settings, unwrapped_of
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.swa_utils import AveragedModel

import vitfast


def trained(model):
    """A step of an optimizer whose state is in such files too."""
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer


def by_timm(model, folder, ema=None):
    saver = CheckpointSaver(
        model, trained(model), args=settings(), model_ema=ema, checkpoint_dir=str(folder), amp_scaler=None
    )
    saver.save_checkpoint(3, metric=np.float64(71.5))
    return folder / "last.pth.tar"


def by_torch(model, folder):
    path, optimizer = folder / "run.pt", trained(model)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    parts = {"epoch": 3, "optimizer": optimizer.state_dict(), "scheduler": schedule.state_dict(), "args": settings()}
    torch.save(parts | {"model_state_dict": model.state_dict()}, path)
    return path


def by_torch_before_1_6(model, folder):
    parts = {"args": settings(), "metric": np.float64(3), "state_dict": model.state_dict()}
    torch.save(parts, folder / "old.pth", _use_new_zipfile_serialization=False)
    return folder / "old.pth"


class Lit(lightning.LightningModule):
    def __init__(self, attribute, recipe, stage):
        super().__init__()
        self.save_hyperparameters()
        setattr(self, attribute, build())

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)]

    def training_step(self, batch, _):
        loss = getattr(self, self.hparams.attribute)(batch).square().mean()
        self.log("loss", loss)
        return loss


def by_lightning(model, folder, attribute="model"):
    module = Lit(attribute, Recipe(), Stage.WARM)
    getattr(module, attribute).load_state_dict(model.state_dict())
    keep = lightning.pytorch.callbacks.ModelCheckpoint(dirpath=folder, filename="kept", monitor="loss")
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[keep, lightning.pytorch.callbacks.EarlyStopping("loss", check_on_train_epoch_end=True)],
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(2, 3, 32, 32)))
    model.load_state_dict(getattr(module, attribute).state_dict())
    return Path(keep.best_model_path)


def by_fabric(model, folder):
    fabric = lightning.Fabric(accelerator="cpu")
    wrapped, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters()))
    fabric.save(folder / "fabric.ckpt", {"model": wrapped, "optimizer": optimizer, "recipe": Recipe(), "step": 3})
    return folder / "fabric.ckpt"


def by_accelerate(model, folder, **how):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(model, trained(model))
    accelerator.save_state(folder / "state", **how)
    return folder / "state"


def by_accelerate_in_shards(model, folder, **how):
    Accelerator(cpu=True).save_model(model, folder, max_shard_size="500KB", **how)
    assert len(list(folder.glob("*-of-*"))) > 2
    return folder


class Classifier(torch.nn.Module):
    """What transformers' Trainer asks for: a loss in a dict."""

    def __init__(self, model):
        super().__init__()
        self.backbone = model

    def forward(self, x):
        return {"loss": self.backbone(x).sum()}


def by_trainer(model, folder):
    args = transformers.TrainingArguments(folder, max_steps=1, report_to=[], use_cpu=True, save_steps=1)
    trainer = transformers.Trainer(Classifier(model), args, train_dataset=[{"x": torch.randn(3, 32, 32)}] * 8)
    trainer.train()
    return folder / "checkpoint-1"


def by_timms_hub(model, folder):
    theirs = timm.create_model(NAME, **SMALL)
    theirs.load_state_dict(model.state_dict())
    save_for_hf(theirs, folder, safe_serialization="both")
    return folder


def by_transformers_around_timm(model, folder):
    small = SMALL | {"num_labels": SMALL["num_classes"]}
    config = transformers.TimmWrapperConfig(
        architecture=NAME, num_labels=small.pop("num_labels"), model_args={k: small[k] for k in ("img_size", "depth")}
    )
    wrapper = transformers.TimmWrapperForImageClassification(config)
    wrapper.timm_model.load_state_dict(model.state_dict())
    wrapper.save_pretrained(folder)
    return folder


def renamed(name):
    def write(model, folder):
        save_file(model.state_dict(), folder / name)
        return folder / name

    return write


def probe(name):
    """A backbone under a name, and its classifier beside it."""
    return lambda m: {k if k.startswith("head.") else f"{name}.{k}": v for k, v in m.state_dict().items()}


def saved(content):
    def write(model, folder):
        torch.save(content(model), folder / "m.pth")
        return folder / "m.pth"

    return write


WRITERS = {
    "timm": by_timm,
    "torch": by_torch,
    "torch before 1.6": by_torch_before_1_6,
    "Lightning, model": by_lightning,
    "Lightning, net": lambda m, f: by_lightning(m, f, "net"),
    "Fabric": by_fabric,
    "accelerate": by_accelerate,
    "accelerate, pickled": lambda m, f: by_accelerate(m, f, safe_serialization=False),
    "accelerate, file": lambda m, f: by_accelerate(m, f) / "model.safetensors",
    "accelerate, shards": by_accelerate_in_shards,
    "accelerate, pickled shards": lambda m, f: by_accelerate_in_shards(m, f, safe_serialization=False),
    "accelerate, index": lambda m, f: by_accelerate_in_shards(m, f) / "model.safetensors.index.json",
    "transformers' Trainer": by_trainer,
    "timm's hub": by_timms_hub,
    "timm's averages, V2": saved(lambda m: ModelEmaV2(m).state_dict()),
    "timm's averages, V3": saved(lambda m: ModelEmaV3(m).state_dict()),
    "torch's averages": saved(lambda m: AveragedModel(m).state_dict()),
    "DataParallel": saved(lambda m: torch.nn.DataParallel(m).state_dict()),
    "compiled": saved(lambda m: torch.compile(m, backend="eager").state_dict()),
    "FSDP": saved(unwrapped_of("_fsdp_wrapped_module.", "_fsdp_wrapped_module.")),
    "FSDP over checkpointing": saved(
        unwrapped_of("module._fsdp_wrapped_module.", "_fsdp_wrapped_module._checkpoint_wrapped_module.")
    ),
    "checkpointing": saved(unwrapped_of("", "_checkpoint_wrapped_module.")),
    "Lightning over DDP": saved(unwrapped_of("model.module.")),
    "student": saved(lambda m: {"student": m.state_dict(), "epoch": 3}),
    "teacher": saved(lambda m: {"teacher": unwrapped_of("module.backbone.")(m), "args": settings()}),
    "model_state": saved(lambda m: {"model_state": m.state_dict(), "best": np.float64(1)}),
    "timm in transformers": by_transformers_around_timm,
    "compiled averages": saved(lambda m: torch.compile(AveragedModel(m), backend="eager").state_dict()),
    "averages in DataParallel": saved(lambda m: torch.nn.DataParallel(AveragedModel(m)).state_dict()),
    "averages of a holder": saved(lambda m: AveragedModel(torch.nn.ModuleDict({"net": m})).state_dict()),
    "averaged by ema_pytorch": saved(unwrapped_of("ema_model.")),
    "a strategy of Lightning's": saved(unwrapped_of("_forward_module.model.")),
    "backbone and head": saved(probe("backbone")),
    "backbone and head of Lightning": saved(lambda m: {"state_dict": probe("model")(m), "args": settings()}),
    "a config called model": saved(lambda m: {"model": {"name": "vit"}, "net_state": m.state_dict()}),
    "an average's numbers": saved(
        lambda m: {"state_dict": m.state_dict(), "model_ema": {"decay": 0.9, "updates": torch.tensor(3)}}
    ),
    "no average yet": saved(lambda m: {"state_dict": m.state_dict(), "state_dict_ema": {}}),
    "a dict of one's own": saved(lambda m: {"model": CfgNode(**m.state_dict()), "args": settings()}),
    ".sft": renamed("m.sft"),
    ".SAFETENSORS": renamed("m.SAFETENSORS"),
    "safetensors called .bin": renamed("m.bin"),
    "network": saved(lambda m: {"network": unwrapped_of("encoder.")(m)}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())
def test_file_of_another_library_is_refused_or_gives_other_weights(write, tmp_path):
    model = build()
    path = write(model, tmp_path)
    assert_loaded(read(path), model)
    assert_loaded(vitfast.create_model(NAME, **SMALL, checkpoint_path=path), model)


@pytest.mark.parametrize("write", [by_timm, by_trainer, by_lightning], ids=lambda write: write.__name__)
def test_error_recommends_what_fails_too(write, tmp_path):
    """A pickled file is refused unasked; the call that the error names reads it."""
    path = write(build(), tmp_path)
    if path.is_dir():
        path = vitfast.load_checkpoint(build(), path) and path / "training_args.bin"
    with pytest.raises(ValueError, match=r"load_checkpoint\(model, path, allow_pickle=True\)"):
        vitfast.read_checkpoint(path)
    if path.name == "training_args.bin":
        with pytest.raises(ValueError, match="flat mapping of names to tensors, got a .*TrainingArguments"):
            read(path)
    else:
        assert read(path)


def test_averaged_weights_of_timms_trainer_are_not_preferred(tmp_path):
    model = build()
    ema = ModelEmaV3(model, decay=0.5)
    path = by_timm(model, tmp_path, ema)
    assert not torch.equal(model.head.bias, ema.module.head.bias)
    assert_loaded(read(path), ema.module)


class Runs:
    """An object whose unpickling would be seen."""

    seen = False

    def __reduce__(self):
        return run, ()


def run():
    Runs.seen = True


@pytest.mark.parametrize("new", [True, False], ids=["zip", "before 1.6"])
def test_object_beside_the_weights_is_run(new, tmp_path):
    model, safe = build(), set(torch.serialization.get_safe_globals())
    torch.save({"hook": Runs(), "model": model.state_dict()}, tmp_path / "m.pt", _use_new_zipfile_serialization=new)
    assert_loaded(read(tmp_path / "m.pt"), model)
    assert not Runs.seen
    assert set(torch.serialization.get_safe_globals()) == safe


def test_pickle_shows_its_stand_ins_to_another_load(tmp_path):
    """Another thread's torch.load refuses what it does not know, whatever is read meanwhile; and all reads succeed."""
    torch.save({"args": settings()}, tmp_path / "theirs.pt")
    for name in "ab":
        torch.save({"model": build().state_dict(), "args": [settings() for _ in range(20)]}, tmp_path / f"{name}.pt")
    seen, failed, done = [], [], threading.Event()

    def load():
        while not done.is_set():
            try:
                seen.append(torch.load(tmp_path / "theirs.pt", weights_only=True))
            except Exception:
                continue

    def read_often(path):
        for _ in range(8):
            try:
                vitfast.read_checkpoint(path, allow_pickle=True)
            except Exception as error:
                failed.append(error)

    other = threading.Thread(target=load)
    reads = [threading.Thread(target=read_often, args=(tmp_path / f"{name}.pt",)) for name in "ab"]
    for thread in (other, *reads):
        thread.start()
    for thread in reads:
        thread.join()
    done.set()
    other.join()
    assert not seen and not failed


# pickles that write into what torch has, or call what no file may call
HOSTILE = {
    "a name with a null": b"\x80\x02ca\x00b\nc\n)R.",
    "attribute of a class": b"\x80\x02ctorch\nTensor\nN}X\x05\x00\x00\x00helloK\x01s\x86b.",
    "attribute of a function": b"\x80\x02ctorch._utils\n_rebuild_tensor\nN}X\x05\x00\x00\x00helloK\x01s\x86b.",
    "call of an object": b"\x80\x02ctorch\ndevice\nX\x03\x00\x00\x00cpu\x85Rcx\ny\n\x85R.",
    "class by another opcode": b"\x80\x02(cos\nsystem\nX\x04\x00\x00\x00trueo.",
    # keyword arguments that are addresses of C++ objects
    "allocator": b"\x80\x04ctorch.storage\nUntypedStorage\nI8\n\x85}X\t\0\0\0allocatorI1094795584\ns\x92.",
    "tensor at an address": b"\x80\x04ctorch\nTensor\n)}X\x05\0\0\0cdataI1094795584\ns\x92.",
    "module os": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_pickle_writes_runs_or_is_not_named(case, tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.pth", "w") as file:
        for name, content in (("data.pkl", HOSTILE[case]), ("version", b"3"), ("byteorder", b"little")):
            file.writestr(f"bad/{name}", content)
    with pytest.raises(ValueError, match=r"bad\.pth' is not a whole file of plain weights: (?!.*issue)"):
        vitfast.read_checkpoint(tmp_path / "bad.pth", allow_pickle=True)
    assert not hasattr(torch.Tensor, "hello") and not hasattr(torch._utils._rebuild_tensor, "hello")


def test_tar_archive_is_unpacked(tmp_path, monkeypatch):
    """As torch's files were before 0.1.10: what is in it could be written anywhere."""
    (tmp_path / "storages").write_bytes(b"")
    with tarfile.open(tmp_path / "m.pt", "w") as file:
        file.add(tmp_path / "storages", "storages")
    monkeypatch.setattr(tarfile.TarFile, "extract", lambda *_, **__: pytest.fail("unpacked"))
    with pytest.raises(ValueError, match=r"m\.pt' is not a whole file of plain weights"):
        vitfast.read_checkpoint(tmp_path / "m.pt", allow_pickle=True)


def test_weight_of_an_unknown_class_is_taken_for_a_plain_one(tmp_path):
    """What its values mean only its class knows."""
    state = build().state_dict()
    state["head.bias"] = settings().labels
    torch.save({"state_dict": state}, tmp_path / "m.pt")
    with pytest.raises(ValueError, match="'head.bias': foreign_files.Labels"):
        read(tmp_path / "m.pt")


class Remembers(torch.nn.Linear):
    def get_extra_state(self):
        return getattr(self, "memory", {"steps": 3})

    def set_extra_state(self, state):
        self.memory = state


def test_extra_state_is_refused_or_comes_in_part(tmp_path):
    """Plain data is handed on; what was passed over on reading is not handed on as if it were the state."""
    model, other = build(), build()
    model.head, other.head = Remembers(192, 5), Remembers(192, 5)
    model.head.memory = {"steps": 7, "at": [1, 2]}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    vitfast.load_checkpoint(other, tmp_path / "m.pt", allow_pickle=True)
    assert other.head.memory == model.head.memory
    model.head.memory = {"steps": Recipe()}
    torch.save(model.state_dict(), tmp_path / "m.pt")
    with pytest.raises(ValueError, match="head._extra_state"):
        vitfast.load_checkpoint(other, tmp_path / "m.pt", allow_pickle=True)
    assert other.head.memory == {"steps": 7, "at": [1, 2]}


def jit(model, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


NOT_WEIGHTS = {
    "module.pt": (torch.save, r"got a vitfast\.model\.vit\.ViT; of a model save the state_dict\(\)"),
    "script.pt": (jit, "TorchScript"),
    "optimizer.bin": (lambda m, p: torch.save(trained(m).state_dict(), p), "'state': dict, 'param_groups': list"),
    "arrays.pt": (lambda m, p: torch.save({"a": np.zeros(3)}, p), r"'a': numpy\._core"),
    "objects.npz": (lambda m, p: np.savez(p, a=np.array([{}], object)), "objects, which only pickle reads"),
    "one.npy": (lambda m, p: np.save(p, np.ones(3)), "one array"),
    "list.pt": (lambda m, p: torch.save([1], p), "got a list"),
    "half.pt": (lambda m, p: p.write_bytes(b"PK\x03\x04 and no more"), "not a whole file"),
    "x.bin.index.json": (lambda m, p: p.write_text('{"weights": 3}'), "no index of shards"),
    "y.bin.index.json": (lambda m, p: p.write_text('{"weight_map": {"a": "../a.bin"}}'), "outside its folder"),
}


@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_file_without_a_state_dict_is_not_named_for_what_it_is(name, tmp_path):
    write, said = NOT_WEIGHTS[name]
    write(build(), tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}.*{said}"):
        read(tmp_path / name)


def test_folder_of_distributed_checkpoint_is_not_named_or_its_advice_fails(tmp_path):
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=tmp_path / "run")
    with pytest.raises(ValueError, match=r"torch\.distributed\.checkpoint.*dcp_to_torch_save\(folder, file\)"):
        read(tmp_path / "run")
    dcp_to_torch_save(tmp_path / "run", tmp_path / "run.pt")
    assert_loaded(read(tmp_path / "run.pt"), model)


def test_file_of_jax_is_read_in_part_or_otherwise_than_timm_does(tmp_path):
    theirs = timm.create_model(NAME, **SMALL)
    D, flat = 192, {}
    names = {"cls": theirs.cls_token, "Transformer/posembed_input/pos_embedding": theirs.pos_embed}
    names["embedding/kernel"] = theirs.patch_embed.proj.weight.permute(2, 3, 1, 0)
    names["embedding/bias"] = theirs.patch_embed.proj.bias
    norms = {"Transformer/encoder_norm": theirs.norm}
    for i, block in enumerate(theirs.blocks):
        at = f"Transformer/encoderblock_{i}"
        norms |= {f"{at}/LayerNorm_0": block.norm1, f"{at}/LayerNorm_2": block.norm2}
        qkv, attn = block.attn.qkv, f"{at}/MultiHeadDotProductAttention_1"
        for part, weight, bias in zip(("query", "key", "value"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True):
            names |= {f"{attn}/{part}/kernel": weight.T.reshape(D, 3, 64), f"{attn}/{part}/bias": bias.reshape(3, 64)}
        names[f"{attn}/out/kernel"] = block.attn.proj.weight.T.reshape(3, 64, D)
        names[f"{attn}/out/bias"] = block.attn.proj.bias
        for n, fc in enumerate((block.mlp.fc1, block.mlp.fc2)):
            names |= {f"{at}/MlpBlock_3/Dense_{n}/kernel": fc.weight.T, f"{at}/MlpBlock_3/Dense_{n}/bias": fc.bias}
    for name, norm in norms.items():
        names |= {f"{name}/scale": norm.weight, f"{name}/bias": norm.bias}
    names |= {"head/kernel": theirs.head.weight.T, "head/bias": theirs.head.bias}
    flat = {name: value.detach().numpy() for name, value in names.items()}
    np.savez(tmp_path / "jax.npz", **flat)
    state = vitfast.read_checkpoint(tmp_path / "jax.npz")
    assert state.keys() == names.keys()
    assert all(torch.equal(state[name], value) for name, value in names.items())
    read_by_timm = timm.create_model(NAME, **SMALL, checkpoint_path=str(tmp_path / "jax.npz"))
    assert torch.equal(read_by_timm.head.weight, state["head/kernel"].T)
    assert torch.equal(read_by_timm.pos_embed, state["Transformer/posembed_input/pos_embedding"])


def test_shard_is_missing_and_not_named(tmp_path):
    by_accelerate_in_shards(build(), tmp_path)
    lost = sorted(tmp_path.glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        read(tmp_path)


def test_pickled_shards_are_refused_under_a_name_that_nobody_passed(tmp_path):
    by_accelerate_in_shards(build(), tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=rf"got '{tmp_path}' \(pytorch_model-00001-of-\S+\.bin\).*allow_pickle=True"):
        vitfast.read_checkpoint(tmp_path)


def test_object_in_the_first_of_several_shards_is_forgotten(tmp_path):
    """Extra state of which a part was passed over is refused, wherever among the shards that was; later ones win."""
    model = build()
    model.head = Remembers(192, 5)
    model.head.memory = {"steps": Recipe()}
    first, second = {"head._extra_state": {"steps": Recipe()}, "head.bias": torch.ones(5)}, dict(model.state_dict())
    del second["head._extra_state"]
    for name, content in (("a.bin", first), ("b.bin", second)):
        torch.save(content, tmp_path / name)
    (tmp_path / "m.bin.index.json").write_text('{"weight_map": {"x": "a.bin", "y": "b.bin"}}')
    with pytest.raises(ValueError, match="head._extra_state"):
        read(tmp_path / "m.bin.index.json")
    torch.save({"head.bias": torch.ones(5)}, tmp_path / "a.bin")
    state = vitfast.read_checkpoint(tmp_path / "m.bin.index.json", allow_pickle=True)
    assert torch.equal(state["head.bias"], model.head.bias)


def test_names_within_names_stop_after_the_first(tmp_path):
    """What is read, since weights under a last prefix can be loaded."""
    model = build()
    torch.save(unwrapped_of("model.backbone.net.")(model), tmp_path / "m.pt")
    assert [*vitfast.read_checkpoint(tmp_path / "m.pt", allow_pickle=True)] == [*model.state_dict()]
    assert_loaded(read(tmp_path / "m.pt"), model)


def test_timms_getter_saves_what_cannot_be_read(tmp_path):
    getter = timm.create_model(NAME, **SMALL, features_only=True, out_indices=(0, 1))
    torch.save(getter.state_dict(), tmp_path / "getter.pt")
    state = vitfast.read_checkpoint(tmp_path / "getter.pt", allow_pickle=True)
    assert {*state} == {name.removeprefix("model.") for name in getter.state_dict()} and "cls_token" in state


def test_folder_of_several_models_gives_one_of_them(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(build(), build())
    accelerator.save_state(tmp_path / "run")
    with pytest.raises(ValueError, match=r"several models, model\.safetensors, model_1\.safetensors"):
        read(tmp_path / "run")
    save_file(build().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"folder with model\.safetensors or pytorch_model\.bin"):
        read(tmp_path)
