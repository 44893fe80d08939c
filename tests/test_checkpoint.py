"""Checkpoint files and the state dicts in them: what survives, what is refused, what a bad file leaves behind."""

import json
import os

import pytest
import timm
import torch
import vit_pytorch
from accelerate import cpu_offload
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.layers import resample_abs_pos_embed

import vitfast
from vitfast.checkpoints import checkpoint
from vitfast.weights.resample import resample_pos_embed

SMALL = dict(image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16)


def model_of(image_size=32, patch_size=8, **fields):
    small = dict(num_classes=5, dim=32, depth=2, heads=2) | fields
    return vitfast.ViT.from_config(vitfast.ViTConfig(image_size=image_size, patch_size=patch_size, **small))


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, value in expected.items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value), name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


FLAVOURS = {
    "timm": model_of,
    "registers": lambda: model_of(register_tokens=4, layer_scale=0.1),
    "distilled": lambda: model_of(distillation_token=True),
    "map": lambda: model_of(pool="map", class_token=False),
    "vit_pytorch": lambda: vitfast.ViT(**SMALL),
    "vit_pytorch_mean": lambda: vitfast.ViT(**SMALL, pool="mean"),
    "bf16": lambda: model_of().bfloat16(),
}
every_flavour = pytest.mark.parametrize("build", FLAVOURS.values(), ids=FLAVOURS.keys())


@every_flavour
def test_weights_change_on_the_way_through_a_file(build, path):
    model, other = build(), build()
    vitfast.save_checkpoint(model, path)
    assert vitfast.load_checkpoint(other, str(path)) is other
    assert_same(other.state_dict(), snapshot(model))
    x = torch.randn(2, 3, 32, 32, dtype=next(model.parameters()).dtype)
    assert torch.equal(other.eval()(x), model.eval()(x))


@every_flavour
def test_file_does_not_say_which_model_it_is(build, path):
    model = build()
    vitfast.save_checkpoint(model, path)
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["vitfast_config"])
    assert vitfast.ViTConfig(**config) == model.config


def test_layout_of_vit_pytorch_is_not_what_vit_pytorch_reads(path):
    model = vitfast.ViT(**SMALL)
    vitfast.save_checkpoint(model, path, layout="vit_pytorch")
    theirs = vit_pytorch.ViT(**SMALL)
    theirs.load_state_dict(load_file(path))
    again = vitfast.load_checkpoint(vitfast.ViT(**SMALL), path)
    assert_same(again.state_dict(layout="vit_pytorch"), theirs.state_dict())


@pytest.mark.parametrize("step", ["save_file", "replace"])
def test_failing_save_damages_the_old_file_or_leaves_a_temporary_one(step, path, monkeypatch):
    model = model_of()
    vitfast.save_checkpoint(model, path)
    old = path.read_bytes()

    def fail(first, second, **_):
        if step == "save_file":
            with open(second, "wb") as file:
                file.write(b"half of it")
        raise OSError("no space left on device")

    monkeypatch.setattr(*((checkpoint, "save_file") if step == "save_file" else (checkpoint.os, "replace")), fail)
    with pytest.raises(OSError, match="no space left"):
        vitfast.save_checkpoint(model_of(), path)
    assert path.read_bytes() == old
    assert os.listdir(path.parent) == [path.name]


def test_file_can_be_read_by_its_owner_only(path):
    """A temporary file is private; the checkpoint that replaces another must be as readable as any new file."""
    plain = path.with_name("plain")
    plain.touch()
    vitfast.save_checkpoint(model_of(), path)
    assert oct(path.stat().st_mode) == oct(plain.stat().st_mode)


@pytest.mark.parametrize("name", ["model.pt", "model", "model.safetensors.gz"])
def test_other_extension_is_written(name, tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.safetensors, got"):
        vitfast.save_checkpoint(model_of(), tmp_path / name)
    assert not os.listdir(tmp_path)


def test_missing_file_or_folder_is_not_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.safetensors"):
        vitfast.load_checkpoint(model_of(), tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        vitfast.save_checkpoint(model_of(), tmp_path / "absent" / "model.safetensors")


@pytest.mark.parametrize("suffix", ["pt", "pth", "bin"])
def test_pickled_file_is_read_unasked_or_not_at_all(suffix, tmp_path):
    model, path = model_of(), tmp_path / f"model.{suffix}"
    torch.save(model.state_dict(), path)
    other = model_of()
    before = snapshot(other)
    with pytest.raises(ValueError, match=r"allow_pickle=True\) if you trust"):
        vitfast.load_checkpoint(other, path)
    assert_same(other.state_dict(), before)
    vitfast.load_checkpoint(other, path, allow_pickle=True)
    assert_same(other.state_dict(), snapshot(model))


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_pickled_file_runs_code(tmp_path):
    torch.save({"head.weight": RunsACommand(f"touch {tmp_path / 'ran'}")}, tmp_path / "evil.pt")
    with pytest.raises(Exception, match=r"evil.pt' is not.* unsupported GLOBAL \w+\.system"):
        vitfast.load_checkpoint(model_of(), tmp_path / "evil.pt", allow_pickle=True)
    assert os.listdir(tmp_path) == ["evil.pt"]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_prefix_of_ddp_or_compile_is_not_taken_off(prefix, path):
    model = model_of()
    save_file({prefix + name: value for name, value in model.state_dict().items()}, path)
    assert_same(vitfast.load_checkpoint(model_of(), path).state_dict(), snapshot(model))


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_ema"], ["model", "state_dict"]], ids=str)
def test_weights_inside_a_training_checkpoint_are_not_found(keys, tmp_path):
    model = model_of()
    content = {f"module.{name}": value for name, value in model.state_dict().items()}
    for key in reversed(keys):
        content = {"epoch": 3, "optimizer": {"state": {}}, key: content}
    torch.save(content, tmp_path / "run.pt")
    other = vitfast.load_checkpoint(model_of(), tmp_path / "run.pt", allow_pickle=True)
    assert_same(other.state_dict(), snapshot(model))


NOT_WEIGHTS = [{"head.weight": [1.0, 2.0]}, [torch.zeros(1)], torch.zeros(1), {0: torch.zeros(1)}, {"model": 3}]


@pytest.mark.parametrize("content", NOT_WEIGHTS, ids=str)
def test_file_without_a_flat_mapping_of_tensors_is_taken(content, tmp_path):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt.*flat mapping of names to tensors"):
        vitfast.read_checkpoint(tmp_path / "other.pt", allow_pickle=True)


def test_file_that_contains_itself_is_unwrapped_for_ever(tmp_path):
    cycle = {}
    cycle["state_dict"] = cycle
    torch.save(cycle, tmp_path / "cycle.pt")
    with pytest.raises(ValueError, match="flat mapping"):
        vitfast.read_checkpoint(tmp_path / "cycle.pt", allow_pickle=True)


def header(**tensors):
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


WEIGHT = dict(dtype="F32", shape=[5, 32], data_offsets=[0, 640])
HOSTILE = {
    "empty file": b"",
    "header of length 0": (0).to_bytes(8, "little"),
    "header longer than the file": (10**6).to_bytes(8, "little") + b"{}",
    "header longer than memory": (2**63).to_bytes(8, "little") + b"{}",
    "garbage": bytes(range(256)) * 8,
    "header that is no JSON": (4).to_bytes(8, "little") + b"{,,}",
    "truncated data": header(head=WEIGHT) + bytes(639),
    "trailing data": header(head=WEIGHT) + bytes(700),
    "shape larger than its bytes": header(head=WEIGHT | {"shape": [500, 32]}) + bytes(640),
    "shape whose product overflows": header(head=WEIGHT | {"shape": [2**62, 8]}) + bytes(640),
    "negative dim": header(head=WEIGHT | {"shape": [-5, -32]}) + bytes(640),
    "unknown dtype": header(head=WEIGHT | {"dtype": "F31"}) + bytes(640),
    "overlapping tensors": header(a=WEIGHT, b=WEIGHT) + bytes(640),
    "gap before the data": header(head=WEIGHT | {"data_offsets": [8, 648]}) + bytes(648),
    "pickled inside": b"\x80\x02}q\x00X\x01\x00\x00\x00aq\x01K\x01s.",
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_file_crashes_hangs_or_changes_the_model(content, path):
    model = model_of()
    before = snapshot(model)
    path.write_bytes(content)
    with pytest.raises((SafetensorError, ValueError)):
        vitfast.load_checkpoint(model, path)
    assert_same(model.state_dict(), before)


# what a newer release or a hand may have written there
CONFIGS = ["", "{", "[]", "3", "null", '{"field_of_a_newer_release": 1}', '{"dim": -1}']


@pytest.mark.parametrize("config", CONFIGS)
def test_config_that_is_none_gives_an_obscure_error_or_changes_the_model(config, path):
    model = model_of()
    before = snapshot(model)
    save_file(snapshot(model_of()), path, metadata={"vitfast_config": config})
    with pytest.raises(ValueError, match=path.name):
        vitfast.load_checkpoint(model, path)
    assert_same(model.state_dict(), before)


def test_keys_that_do_not_fit_are_reported_one_at_a_time(path):
    model = model_of()
    state = snapshot(model_of())
    del state["cls_token"], state["blocks.1.attn.qkv.weight"]
    state |= {"stray": torch.zeros(1), "head.weight": torch.zeros(7, 32), "norm.bias": torch.zeros(1, 32)}
    save_file(state, path)
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="5 keys do not fit") as error:
        vitfast.load_checkpoint(model, path)
    for part in (
        "missing: cls_token [1, 1, 32]", "missing: blocks.1.attn.qkv.weight [96, 32]", "unexpected: stray",
        "wrong shape: head.weight must be [5, 32], got [7, 32]", "wrong shape: norm.bias must be [32], got [1, 32]",
    ):  # fmt: skip
        assert part in str(error.value)
    assert_same(model.state_dict(), before)
    with pytest.raises(RuntimeError, match="2 keys do not fit"):
        vitfast.load_checkpoint(model, path, strict=False)
    assert_same(model.state_dict(), before)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_file_of_timm_gives_another_model(name, path):
    theirs = timm.create_model(name, img_size=32, num_classes=7).eval()
    save_file(theirs.state_dict(), path)
    ours = vitfast.create_model(name, img_size=32, num_classes=7).eval()
    vitfast.load_checkpoint(ours, path)
    assert_same(ours.state_dict(), theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


GRIDS = [
    ((2, 8), (4, 4)), ((4, 4), (2, 8)), ((14, 14), (10, 10)), ((7, 7), (12, 9)), ((3, 5), (6, 5)), ((1, 1), (3, 2)),
]  # fmt: skip


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize(("old", "new"), GRIDS, ids=str)
def test_resampled_positions_differ_from_timm(old, new, prefix):
    """Two grids with the same number of patches are still two grids."""
    positions = torch.randn(1, prefix + old[0] * old[1], 8)
    resampled = resample_pos_embed(positions, new, old, prefix)
    expected = resample_abs_pos_embed(positions, new_size=list(new), old_size=list(old), num_prefix_tokens=prefix)
    torch.testing.assert_close(resampled, expected, rtol=0, atol=1e-6)
    assert torch.equal(resampled[:, :prefix], positions[:, :prefix])
    half = resample_pos_embed(positions.bfloat16(), new, old, prefix)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.02, atol=0.02)


def test_positions_are_copied_for_the_same_grid_or_taken_with_a_wrong_count():
    positions = torch.randn(1, 17, 8)
    assert resample_pos_embed(positions, (4, 4), (4, 4), 1) is positions
    with pytest.raises(ValueError, match=r"\[1, 13, D\].*3x4 grid, got \[1, 17, 8\]"):
        resample_pos_embed(positions, (4, 4), (3, 4), 1)


@pytest.mark.parametrize("fields", [{}, dict(register_tokens=4), dict(pos_embed="patches", register_tokens=4)], ids=str)
@pytest.mark.parametrize("size", [160, (96, 256)], ids=str)
def test_loaded_positions_differ_from_timm_at_another_image_size(size, fields, path):
    trained, model = model_of(224, 16, **fields), model_of(size, 16, **fields)
    vitfast.save_checkpoint(trained, path)
    vitfast.load_checkpoint(model, path)
    expected = resample_abs_pos_embed(
        trained.pos_embed.detach(), new_size=list(model.patch_embed.grid_size), old_size=[14, 14],
        num_prefix_tokens=0 if fields.get("pos_embed") else model.num_prefix_tokens,
    )  # fmt: skip
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=0, atol=1e-6)
    others = {name: value for name, value in snapshot(trained).items() if name != "pos_embed"}
    assert_same({name: value for name, value in model.state_dict().items() if name != "pos_embed"}, others)


@pytest.mark.parametrize(("old", "new"), [((2, 8), (4, 4)), ((2, 8), (3, 3)), ((2, 6), (3, 8))], ids=str)
def test_positions_of_a_rectangle_are_taken_for_a_square(old, new, path):
    """The file holds its config, so its grid need not be guessed from the number of positions."""
    trained, model = (model_of((8 * rows, 8 * columns)) for rows, columns in (old, new))
    vitfast.save_checkpoint(trained, path)
    vitfast.load_checkpoint(model, path)
    expected = resample_abs_pos_embed(
        trained.pos_embed.detach(), new_size=list(new), old_size=list(old), num_prefix_tokens=1
    )
    torch.testing.assert_close(model.pos_embed.detach(), expected, rtol=0, atol=1e-6)


def old_release(state):
    """Releases 1.4 to 1.16.0 kept a batch dim of 1 on tokens and positions, positions first."""
    tokens = {name: state[name].unsqueeze(0) for name in ("pos_embedding", "cls_token")}
    return tokens | {name: value for name, value in state.items() if name not in tokens}


def test_weights_of_an_old_release_are_refused():
    theirs, ours = vit_pytorch.ViT(**SMALL), vitfast.ViT(**SMALL)
    ours.load_state_dict(theirs.state_dict())
    fresh = vitfast.ViT(**SMALL)
    fresh.load_state_dict(old_release(theirs.state_dict()))
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(fresh(x), ours(x))


def test_class_token_of_an_old_mean_pooled_model_is_dropped_silently():
    """Up to 1.16.0 the class token took part in the mean, so such weights mean another model."""
    state = old_release(vit_pytorch.ViT(**SMALL).state_dict())
    ours = vitfast.ViT(**SMALL, pool="mean")
    before = snapshot(ours)
    with pytest.raises(RuntimeError, match=r"(?s)cls_token must be \[0, 64\].*pos_embed must be \[16, 64\]"):
        ours.load_state_dict(state)
    assert_same(ours.state_dict(), before)


def test_optimizer_state_of_an_old_release_is_misaligned_silently():
    ours = vitfast.ViT(**SMALL)
    optimizer = torch.optim.AdamW(ours.parameters())
    ours(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    token, positions = state["state"][0], state["state"][1]
    for entry in (token, positions):
        for name in ("exp_avg", "exp_avg_sq"):
            entry[name] = entry[name].unsqueeze(0)
    state["state"][0], state["state"][1] = positions, token
    resumed = torch.optim.AdamW(ours.parameters())
    with pytest.raises((RuntimeError, ValueError)):
        resumed.load_state_dict(state)
        resumed.step()


def test_weights_before_release_1_4_are_loaded_or_refused_without_the_reason():
    """Without a final norm, and with a function inside a norm in place of a norm inside a function."""
    old = {}
    for name, value in vit_pytorch.ViT(**SMALL).state_dict().items():
        if not name.startswith("transformer.norm."):
            inner = name.replace(".0.to_", ".0.fn.to_").replace(".1.net.", ".1.fn.net.")
            old[inner] = value
    with pytest.raises(RuntimeError, match=r"(?s)vit-pytorch: .* its ViT since release 1\.4.*missing: norm\.weight"):
        vitfast.ViT(**SMALL).load_state_dict(old)


def test_weights_go_into_a_model_of_another_architecture():
    timm_flavoured = vitfast.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10)
    with pytest.raises(ValueError, match="vit-pytorch weights.*vitfast.ViT"):
        timm_flavoured.load_state_dict(vit_pytorch.ViT(**SMALL).state_dict())
    with pytest.raises(ValueError, match="layout='vit_pytorch'"):
        timm_flavoured.state_dict(layout="vit_pytorch")
    with pytest.raises(RuntimeError, match="missing: patch_embed.input_norm.weight"):
        vitfast.ViT(**SMALL).load_state_dict(timm_flavoured.state_dict())
    with pytest.raises(ValueError, match="layout must be"):
        vitfast.ViT(**SMALL).state_dict(layout="flax")


def test_training_checkpoint_gives_other_weights_than_timm(tmp_path):
    """timm's loader takes the averaged weights where a file has both."""
    averaged, raw = model_of(), model_of()
    with torch.no_grad():
        averaged.head.weight.zero_()
    torch.save({"state_dict": raw.state_dict(), "state_dict_ema": averaged.state_dict()}, tmp_path / "last.pth.tar")
    loaded = vitfast.load_checkpoint(model_of(), tmp_path / "last.pth.tar", allow_pickle=True)
    assert_same(loaded.state_dict(), snapshot(averaged))


@pytest.mark.parametrize("wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel])
def test_wrapped_model_cannot_be_saved_or_loaded(wrap, tmp_path):
    model, other = model_of(), model_of()
    vitfast.save_checkpoint(wrap(model), tmp_path / "m.safetensors")
    wrapped = wrap(other)
    assert vitfast.load_checkpoint(wrapped, tmp_path / "m.safetensors") is wrapped
    assert_same(other.state_dict(), snapshot(model))


def test_prefix_of_a_wrapper_is_not_named():
    model = model_of()
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="every key starts with 'module.'"):
        model.load_state_dict(state)


def left_out(module, state, prefix, *_):
    del state[f"{prefix}weight"]


def halved(module, state, prefix, *_):
    state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2


def narrowed(module, state, prefix, *_):
    state[f"{prefix}weight"] = state[f"{prefix}weight"].bfloat16()


def looked_at(module, state, prefix, *_):
    state[f"{prefix}weight"] = state[f"{prefix}weight"].clone()


@pytest.mark.parametrize("hook", [left_out, halved, narrowed, looked_at], ids=lambda hook: hook.__name__)
def test_hook_changes_what_is_saved_without_a_word(hook, path):
    """A file with a config says that it is the whole model; without one it holds what the hook leaves."""
    model = model_of()
    model.head.register_state_dict_post_hook(hook)
    vitfast.save_checkpoint(model, path, with_config=False)
    assert_same(dict(sorted(load_file(path).items())), dict(sorted(model.state_dict().items())))
    os.remove(path)
    model.norm.bias.data[0] = torch.nan  # equal to nothing, and no hook changed it
    if hook is looked_at:
        vitfast.save_checkpoint(model, path)
        assert vitfast.load_checkpoint(model_of(), path)
    else:
        with pytest.raises(NotImplementedError, match=r"hook leaves out or changes head\.weight; with_config"):
            vitfast.save_checkpoint(model, path)
        assert not path.exists()


@pytest.mark.parametrize("with_config", [True, False])
def test_model_without_values_is_a_traceback(with_config, path):
    """On the meta device, or offloaded: what is there is no weight."""
    meta, offloaded = model_of().to("meta"), cpu_offload(model_of(), execution_device="cpu")
    for model in (meta, offloaded):
        with pytest.raises(ValueError, match="no values here for cls_token, pos_embed, .* and others.*meta.*offloaded"):
            vitfast.save_checkpoint(model, path, with_config=with_config)
        assert not list(path.parent.iterdir())


@pytest.mark.parametrize("wrap", [torch.nn.Sequential, lambda m: torch.nn.ModuleDict({"vit": m}), lambda m: m.head])
def test_module_that_is_no_vit_is_an_attribute_error(wrap, path):
    vitfast.save_checkpoint(model_of(), path)
    module = wrap(model_of())
    for call in (vitfast.load_checkpoint, vitfast.save_checkpoint):
        with pytest.raises(TypeError, match=rf"must be a vitfast\.ViT, got {type(module).__name__}"):
            call(module, path)


def test_config_of_a_renamed_file_is_not_read(path):
    model = model_of()
    vitfast.save_checkpoint(model, path)
    renamed = path.rename(path.with_suffix(".sft"))
    assert vitfast.read_config(renamed) == model.config


@pytest.mark.parametrize("with_config", [True, False])
def test_quantised_model_is_a_traceback(with_config, tmp_path):
    """Packed parameters are no tensors; nothing is written."""
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3).eval()
    model = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(NotImplementedError, match="blocks.0.*" if with_config else "tensors only, not blocks.0"):
        checkpoint.save_checkpoint(model, tmp_path / "m.safetensors", with_config=with_config)
    assert not list(tmp_path.iterdir())
