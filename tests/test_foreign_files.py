"""Files that other libraries write of a model: what of them is not read, read wrongly, or refused without a way on."""

import argparse
import enum
import warnings
from collections import OrderedDict, defaultdict
from dataclasses import dataclass
from pathlib import Path

import lightning
import numpy as np
import pytest
import timm
import torch
import torch.distributed.checkpoint as dcp
import transformers
from accelerate import Accelerator
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.utils import CheckpointSaver, ModelEmaV2, ModelEmaV3
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.optim.swa_utils import AveragedModel

import vitfast

NAME, SMALL = "vit_tiny_patch16_224", dict(img_size=32, depth=2, num_classes=5)
TRAINED = dict(zip(("loss.weight", "loss.bias"), torch.ones(2, 3), strict=True))


def build():
    return vitfast.create_model(NAME, **SMALL).eval()


def assert_loaded(model, expected):
    """The same weights, and what they compute."""
    state = model.state_dict()
    assert list(state) == list(expected.state_dict())
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key
    images = torch.randn(2, 3, *expected.config.image_size)
    assert torch.equal(model.eval()(images), expected.eval()(images))


def read(path, **how):
    return vitfast.load_checkpoint(build(), path, allow_pickle=True, **how)


class Stage(enum.Enum):
    WARM = "warm"


@dataclass
class Recipe:
    """A config of the user's own, which whoever reads the weights need not have."""

    rate: float = 0.1


class Attributes(dict):
    pass


Attributes.__qualname__ = Attributes.__name__ = "AttributeDict"
AttributeDict = Attributes


def settings():
    return argparse.Namespace(
        model=NAME, output=Path("/runs/1"), stages={Stage.WARM}, mean=np.float32(0.5), recipe=Recipe(), lrs=(1e-3, 0),
        extra=AttributeDict(a=1, b=[Recipe()]), counts=defaultdict(list, {"a": [1]}), crop=np.arange(3),
    )  # fmt: skip


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


def saved(content):
    def write(model, folder):
        torch.save(content(model), folder / "m.pth")
        return folder / "m.pth"

    return write


def unwrapped_of(prefix, inside=""):
    """As the wrapper names them: `prefix` before all keys, `inside` after each block's number."""
    def content(model):
        names = {k: prefix + k.replace("blocks.1.", f"blocks.1.{inside}") for k in model.state_dict()}
        return OrderedDict((names[key], value) for key, value in model.state_dict().items())

    return content


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
    "module.pt": (torch.save, r"got a vitfast\.vit\.ViT; of a model save the state_dict\(\)"),
    "script.pt": (jit, "TorchScript"),
    "optimizer.bin": (lambda m, p: torch.save(trained(m).state_dict(), p), "'state': dict, 'param_groups': list"),
    "arrays.pt": (lambda m, p: torch.save({"a": np.zeros(3)}, p), r"'a': numpy\._core"),
    "jax.npz": (lambda m, p: np.savez(p, **{"Transformer/encoder_norm/scale": np.ones(3)}), "timm reads them"),
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


def test_file_of_jax_cannot_be_read_as_the_error_says(tmp_path):
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
        for part, weight, bias in zip(
            ("query", "key", "value"), qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True
        ):
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
    with pytest.raises(ValueError, match=r"timm\.create_model\(name, checkpoint_path=path\)"):
        vitfast.create_model(NAME, **SMALL, checkpoint_path=tmp_path / "jax.npz")
    read_by_timm = timm.create_model(NAME, **SMALL, checkpoint_path=str(tmp_path / "jax.npz"))
    model = build()
    model.load_state_dict(read_by_timm.state_dict())
    assert torch.equal(model.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)
    assert torch.equal(model.pos_embed, theirs.pos_embed)


def test_shard_is_missing_and_not_named(tmp_path):
    by_accelerate_in_shards(build(), tmp_path)
    lost = sorted(tmp_path.glob("*-of-*"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=lost.name):
        read(tmp_path)


def test_folder_of_several_models_gives_one_of_them(tmp_path):
    accelerator = Accelerator(cpu=True)
    accelerator.prepare(build(), build())
    accelerator.save_state(tmp_path / "run")
    with pytest.raises(ValueError, match=r"several models, model\.safetensors, model_1\.safetensors"):
        read(tmp_path / "run")
    save_file(build().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"folder with model\.safetensors or pytorch_model\.bin"):
        read(tmp_path)


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
    with pytest.raises(ValueError, match="key='nobody'|several"):
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


def test_vit_pytorch_names_under_a_prefix_are_refused(tmp_path):
    small = dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, mlp_dim=128)
    model, other = vitfast.ViT(**small), vitfast.ViT(**small)
    torch.save({f"model.{k}": v for k, v in model.state_dict(layout="vit_pytorch").items()}, tmp_path / "m.pt")
    assert_loaded(vitfast.load_checkpoint(other, tmp_path / "m.pt", allow_pickle=True), model)


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
}


@pytest.mark.parametrize("family", HUGGING_FACE)
def test_hugging_face_weights_are_so_many_unknown_keys(family, tmp_path):
    """In memory and in the file, whose names differ."""
    theirs = HUGGING_FACE[family]()
    said = "nothing was loaded. These weights have the names of Hugging Face's transformers: rename them"
    with pytest.raises(RuntimeError, match=said):
        build().load_state_dict(theirs.state_dict())
    theirs.save_pretrained(tmp_path)
    for strict in (True, False):
        with pytest.raises(RuntimeError, match=said):
            vitfast.load_checkpoint(build(), tmp_path, strict=strict)


def test_weights_of_facebooks_dinov2_are_not_named_or_the_advice_fails():
    name, keywords = "vit_small_patch14_dinov2", dict(img_size=28, depth=2)
    theirs = timm.create_model(name, **keywords)
    state = theirs.state_dict() | {"mask_token": torch.zeros(1, 384)}
    model = vitfast.create_model(name, **keywords).eval()
    with pytest.raises(RuntimeError, match=r"names of facebook's DINOv2: timm\..*\.checkpoint_filter_fn\(state_dict"):
        model.load_state_dict(state)
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, theirs))
    assert_loaded(model, vitfast_of(theirs, name, **keywords))


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
    with pytest.raises(RuntimeError, match="names of OpenAI's CLIP and open_clip: timm"):
        model.load_state_dict(state)
    model.load_state_dict(timm.models.vision_transformer.checkpoint_filter_fn(state, theirs), strict=False)
    assert torch.equal(model.blocks[1].attn.qkv.weight, theirs.blocks[1].attn.qkv.weight)


OTHERS = {
    "encoder.layers.encoder_layer_0.ln_1.weight": "torchvision",
    "Transformer/encoderblock_0/LayerNorm_0/scale": "JAX",
    "decoder_blocks.0.norm1.weight": "masked autoencoders",
    "preprocessor.patchifier.proj.weight": "AIMv2",
}


@pytest.mark.parametrize("key", OTHERS)
def test_known_names_of_another_library_are_not_named(key):
    with pytest.raises(RuntimeError, match=f"These weights have the names of {OTHERS[key]}"):
        build().load_state_dict(build().state_dict() | {key: torch.ones(3)})
