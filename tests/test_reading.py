"""What reading a file tells beside its tensors: arrays of numpy, config files, which weights were chosen, the hub."""

import hashlib
import json
import sys
import warnings

import ml_dtypes
import numpy as np
import pytest
import timm
import torch
import transformers
from broken_files import Stored, View, npy, npz, safetensors, torch_zip
from foreign_files import NAME, SMALL
from safetensors.torch import save_file
from timm.models._hub import save_for_hf

import vitfast
from vitfast.checkpoints import progress
from vitfast.checkpoints.dtypes import check_dtypes
from vitfast.checkpoints.facts import facts_of
from vitfast.checkpoints.hub import hub_file, is_hub_name
from vitfast.checkpoints.not_finite import not_finite, warn_not_finite
from vitfast.checkpoints.progress import sha256_of
from vitfast.checkpoints.reading import read

TYPES = [
    np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.int8, np.int16, np.int32, np.int64, np.uint8, bool,
    np.complex64, ">f4", ">f2", ">i8",
]  # fmt: skip
SHAPES = [(), (1,), (0,), (3, 0, 2), (2, 3), (2, 3, 4)]


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_array_changes_on_the_way(dtype, save, tmp_path):
    """Of every dtype, in both orders of bytes and of axes."""
    arrays = {f"{i}/c": np.asarray(9 * np.random.randn(*shape)).astype(dtype) for i, shape in enumerate(SHAPES)}
    arrays |= {name.replace("c", "f"): np.asfortranarray(array) for name, array in arrays.items()}
    save(tmp_path / "m.npz", **arrays)
    state = vitfast.read_checkpoint(tmp_path / "m.npz")
    assert [*state] == [*arrays]
    for name, array in arrays.items():
        assert state[name].shape == array.shape
        if dtype is ml_dtypes.bfloat16:
            assert state[name].dtype == torch.bfloat16
            assert np.array_equal(state[name].float().numpy(), array.astype(np.float32))
        else:
            assert state[name].numpy().dtype == array.dtype.newbyteorder("=")
            assert np.array_equal(state[name].numpy(), array)


NAMES = ["params/img/Transformer/encoder_norm/scale", "opt/target/cls", "params/img/head/kernel"]


@pytest.mark.parametrize("file", ["m.npz", "m.bin", "m"])
def test_names_of_big_vision_change_or_a_renamed_file_is_not_read(file, tmp_path):
    np.savez(tmp_path / "m.npz", **dict.fromkeys(NAMES, np.ones(2, np.float32)))
    path = (tmp_path / "m.npz").rename(tmp_path / file)
    assert [*vitfast.read_checkpoint(path)] == NAMES


def test_longer_header_of_numpy_is_refused(tmp_path):
    """Version 2.0 has four bytes for its length."""
    content = npy(version=(2, 0))
    path = npz(tmp_path / "m.npz", {"w": content[:10] + b"\0\0" + content[10:]})
    assert torch.equal(read(path).state["w"], torch.zeros(2, 4))


def test_read_copies_keep_a_file_or_views_a_copy(tmp_path):
    """`read_checkpoint` is for users, who may write over the file; `read` for loading, which takes no memory twice."""
    for name, new in (("m.pth", True), ("old.pth", False)):
        torch.save({"w": torch.ones(5000)}, tmp_path / name, _use_new_zipfile_serialization=new)
        kept = vitfast.read_checkpoint(tmp_path / name, allow_pickle=True)
        view = read(tmp_path / name, allow_pickle=True).state
        view["w"][0] = 7
        with (tmp_path / name).open("r+b") as file:
            content = bytearray(file.read())
            file.seek(0)
            file.write(content.replace(torch.ones(1).numpy().tobytes(), torch.zeros(1).numpy().tobytes()))
        assert torch.equal(kept["w"], torch.ones(5000))
        assert view["w"][0] == 7 and bool(view["w"][-1]) == (not new)


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize("mapped", [True, False])
def test_weights_that_share_memory_are_two(mapped, new, tmp_path):
    tied = torch.randn(4, 6)
    parameter = torch.nn.Parameter(torch.randn(3))
    state = {"a": tied, "b": tied[1:].T, "c": parameter, "d": torch.tensor(3.0), "e": torch.zeros(0, 2)}
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    got = read(tmp_path / "m.pth", allow_pickle=True, mapped=mapped).state
    assert all(torch.equal(got[name], value) and got[name].stride() == value.stride() for name, value in state.items())
    assert got["b"].data_ptr() == got["a"].data_ptr() + 24


@pytest.mark.parametrize("new", [True, False])
def test_weight_with_attributes_is_passed_over(new, tmp_path):
    """As optimizers and sharding leave them there; a pickle has them beside the values."""
    parameter, tensor = torch.nn.Parameter(torch.randn(3)), torch.randn(4)
    parameter.note, tensor.note = {"at": 1}, "it"
    torch.save({"p": parameter, "t": tensor}, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    state = vitfast.read_checkpoint(tmp_path / "m.pth", allow_pickle=True)
    assert torch.equal(state["p"], parameter) and torch.equal(state["t"], tensor)


EVERY = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128, torch.uint16, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.mark.parametrize("new", [True, False])
def test_tensor_of_a_dtype_changes_on_the_way(new, tmp_path):
    state = {str(dtype): (3 * torch.rand(7)).to(dtype) for dtype in EVERY}
    torch.save(state, tmp_path / "m.pth", _use_new_zipfile_serialization=new)
    got = vitfast.read_checkpoint(tmp_path / "m.pth", allow_pickle=True)
    for name, value in state.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name].view(torch.uint8), value.view(torch.uint8))


@pytest.mark.parametrize("mapped", [True, False])
def test_byte_order_of_another_machine_is_not_seen(mapped, tmp_path):
    content = {"w": View(Stored(100), size=(10, 10), stride=(10, 1))}
    storages, order = {"0": np.arange(100, dtype=">f4").tobytes()}, {"byteorder": b"big"}
    path = torch_zip(tmp_path / "m.pth", content, storages, order)
    assert torch.equal(read(path, allow_pickle=True, mapped=mapped).state["w"], torch.arange(100.0).view(10, 10))
    order["byteorder"] = b"medium"
    with pytest.raises(ValueError, match="byte order is 'medium'"):
        read(torch_zip(tmp_path / "m.pth", content, storages, order), allow_pickle=True)


@pytest.mark.parametrize("length", range(1, 9))
def test_view_begins_between_two_numbers(length, tmp_path):
    """Where a zip archive that another program wrote has its bytes; such a view ends the process in some operators."""
    content = {"w": View(Stored(100, kind=torch.DoubleStorage), size=(100,), stride=(1,))}
    storages = {"0": np.arange(100.0).tobytes()}
    state = read(torch_zip(tmp_path / "m.pth", content, storages, root=f"{'r' * length}/"), allow_pickle=True).state
    assert state["w"].data_ptr() % 8 == 0 and torch.equal(state["w"], torch.arange(100.0).double())
    header = b'{"w":{"dtype":"F64","shape":[100],"data_offsets":[0,800]}}' + b" " * length
    weights = read(safetensors(tmp_path / "m.safetensors", header, storages["0"])).state["w"]
    assert weights.data_ptr() % 8 == 0 and torch.equal(weights, state["w"])


def states(**named):
    return {name: {"head.weight": torch.full((2,), value)} for name, value in named.items()}


CHOSEN = [
    (states(state_dict=1.0, state_dict_ema=2.0), None, "state_dict_ema", ("state_dict",), 2),
    (states(model=1.0, model_ema=2.0), None, "model_ema", ("model",), 2),
    (states(model=1.0, model_ema=2.0), "model", "model", (), 1),
    ({"model": states(state_dict=1.0)}, None, "model.state_dict", (), 1),
    (states(teacher=1.0, student=2.0), "student", "student", (), 2),
    (states(weights=1.0), None, "weights", (), 1),
    ({"head.weight": torch.full((2,), 1.0)}, None, "", (), 1),
    ({"student.head.weight": torch.full((2,), 1.0), "teacher.head.weight": torch.full((2,), 2.0)}, "teacher", "teacher",
     (), 2),
]  # fmt: skip


@pytest.mark.parametrize(("content", "key", "chosen", "others", "value"), CHOSEN)
def test_choice_between_weights_is_not_said(content, key, chosen, others, value, tmp_path):
    torch.save(content, tmp_path / "m.pth")
    got = read(tmp_path / "m.pth", allow_pickle=True, key=key)
    assert (got.chosen, got.others, got.file) == (chosen, others, tmp_path / "m.pth")
    assert got.state["head.weight"][0] == value


def test_teacher_or_student_is_guessed(tmp_path):
    torch.save(states(teacher=1.0, student=2.0), tmp_path / "m.pth")
    with pytest.raises(ValueError, match="'teacher', 'student': choose one with .*key='teacher'"):
        read(tmp_path / "m.pth", allow_pickle=True)


def by_timm(folder):
    save_for_hf(timm.create_model(NAME, **SMALL), folder, safe_serialization=True)


def by_transformers(folder):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(folder)


def by_transformers_around_timm(folder):
    config = transformers.TimmWrapperConfig(architecture=NAME, num_labels=5, model_args={"img_size": 32, "depth": 2})
    transformers.TimmWrapperForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("where", ["folder", "file"])
def test_config_files_are_not_found_or_taken_for_another_librarys(where, tmp_path):
    for write in (by_timm, by_transformers, by_transformers_around_timm):
        write(tmp_path / write.__name__)

    def facts(write):
        folder = tmp_path / write.__name__
        return facts_of(folder if where == "folder" else folder / "model.safetensors")

    of_timm, of_transformers, around = facts(by_timm), facts(by_transformers), facts(by_transformers_around_timm)
    assert of_timm.timm["architecture"] == NAME and of_timm.timm["pretrained_cfg"]["mean"] and not of_timm.hf
    assert of_transformers.hf["model_type"] == "vit" and not of_transformers.timm
    assert of_transformers.processor["image_mean"] == [0.1, 0.2, 0.3]
    assert around.timm["architecture"] == NAME and around.hf["model_type"] == "timm_wrapper"
    assert facts_of(tmp_path) == type(of_timm)()
    assert read(tmp_path / "by_timm").facts == of_timm


@pytest.mark.parametrize("text", ["", "{", "[1]", "3", '{"a": 1, "a": 2}', "[" * 10**5, "\ud800"], ids=lambda t: t[:9])
@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_config_that_is_no_json_is_a_traceback_or_passed_over(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode(errors="surrogatepass"))
    save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
    assert vitfast.read_checkpoint(tmp_path)["w"] == 1  # which asks nothing of it
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        _ = read(tmp_path).facts


def test_config_of_gigabytes_is_parsed(tmp_path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 34)
    with pytest.raises(ValueError, match=r"config\.json' has 17179869184 bytes, more than"):
        facts_of(tmp_path)


WRONG = [
    ("config.json", {"model_type": "vit", "num_attention_heads": {"a": 1}}, r"num_attention_heads must be a count"),
    ("config.json", {"model_type": "vit", "num_attention_heads": 10**30}, r"num_attention_heads must be a count"),
    ("config.json", {"model_type": "vit", "hidden_act": {"a": 1}}, r"hidden_act must be text, got {'a': 1}"),
    ("config.json", {"model_type": "vit", "layer_norm_eps": "1e-6"}, r"layer_norm_eps must be a number, got '1e-6'"),
    ("config.json", {"model_type": "vit", "layer_norm_eps": float("nan")}, r"layer_norm_eps must be a number, got nan"),
    ("config.json", {"model_type": "vit", "image_size": "a" * 10**6}, r"image_size must be a size or two, got 'a{79}$"),
    ("config.json", {"model_type": "vit", "image_size": [8, 8, 8]}, r"image_size must be a size or two"),
    ("config.json", {"model_type": "vit", "image_size": True}, r"image_size must be a size or two"),
    ("config.json", {"model_type": "vit", "id2label": ["cat"]}, r"id2label must be classes and names"),
    ("config.json", {"model_type": "vit", "id2label": {"cat": 0}}, r"id2label must be classes and names"),
    ("config.json", {"model_type": "clip", "vision_config": 3}, r"vision_config must be a mapping, got 3"),
    ("config.json", {"model_type": "clip", "vision_config": {"image_size": -1}}, r"vision_config\.image_size must be"),
    ("config.json", {"architecture": ["vit"]}, r"architecture must be text"),
    ("config.json", {"architecture": "vit", "model_args": [1]}, r"model_args must be a mapping"),
    ("config.json", {"architecture": "vit", "pretrained_cfg": {"input_size": [224]}}, r"input_size must be channels"),
    ("config.json", {"architecture": "vit", "pretrained_cfg": {"mean": ["a"]}}, r"\.mean must be numbers"),
    ("preprocessor_config.json", {"image_mean": 3}, r"image_mean must be numbers, got 3"),
    ("preprocessor_config.json", {"size": {"height": "a"}}, r"size must be a size or its sides"),
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"head_width": 0}}}, r"\.head_width must be"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "said"), WRONG, ids=lambda value: str(value)[:40])
def test_entry_of_a_config_is_of_another_kind(name, content, said, tmp_path):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"(?s)^'.*{name}': .*{said}"):
        facts_of(tmp_path)


def test_null_in_a_config_is_an_entry(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "vit", "image_size": null, "new": null, "vision_config": null}'
    )
    assert facts_of(tmp_path).hf == {"model_type": "vit", "new": None}


FINITE = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64]
NOT_FINITE = [(dtype, bad) for dtype in FINITE for bad in (torch.nan, torch.inf, -torch.inf)]
NOT_FINITE.append((torch.float8_e4m3fn, torch.nan))  # it has no Inf


@pytest.mark.parametrize(("dtype", "bad"), NOT_FINITE, ids=str)
def test_weight_that_is_no_number_is_not_named(dtype, bad):
    values = torch.rand(3, 4)
    wrong = values.clone()
    wrong[1, 2] = bad
    state = {"good": values.to(dtype), "bad": wrong.to(dtype).T, "empty": torch.zeros(0), "count": torch.tensor(3)}
    assert not_finite(state) == ["bad"]


def test_warning_comes_for_each_tensor_or_for_good_weights():
    with pytest.warns(UserWarning, match=r"^m\.pth has NaN or Inf in w0, w1, w2, w3, w4 and 4 more$") as caught:
        warn_not_finite({f"w{i}": torch.tensor([torch.nan]) for i in range(9)}, "m.pth")
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert warn_not_finite({"w": torch.ones(3)}, "m.pth") == []


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_weights_of_a_dtype_that_needs_a_scale_are_taken(dtype):
    weights = {"a": torch.ones(2), "b": torch.ones(2).to(dtype)}
    if dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        check_dtypes(weights, "m.pth")
    else:
        with pytest.raises(ValueError, match=f"^m.pth: weights must be float64, .*: b is {str(dtype)[6:]}$"):
            check_dtypes(weights, "m.pth")


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, (1 << 21) + 5])
def test_hash_of_a_file_is_wrong(size, tmp_path):
    content = np.random.bytes(size)
    (tmp_path / "m").write_bytes(content)
    assert sha256_of(tmp_path / "m") == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(("terminal", "large"), [(True, True), (True, False), (False, True)])
def test_progress_is_written_to_a_file_or_of_a_small_one(terminal, large, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "LARGE", 3 if large else 10**9)
    monkeypatch.setattr(progress, "SECONDS", 0)
    (tmp_path / "m").write_bytes(bytes(1 << 21))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    sha256_of(tmp_path / "m")
    out, err = capsys.readouterr()
    assert out == "" and ("sha256 of m: 50 %" in err) == (terminal and large) == bool(err)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the hub as its client makes it, and the switch that forbids the network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(repo, files, revision="main", commit="0" * 40):
        folder = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
        (folder / "blobs").mkdir(exist_ok=True)
        for name, content in files.items():
            blob = folder / "blobs" / hashlib.sha256(content).hexdigest()
            blob.write_bytes(content)
            (snapshot / name).symlink_to(f"../../blobs/{blob.name}")
        return snapshot

    return put


def weights(tmp_path, value=1.0):
    save_file({"w": torch.full((2,), value)}, tmp_path / "w")
    return (tmp_path / "w").read_bytes()


def test_weights_in_the_cache_are_not_found(cache, tmp_path):
    config = json.dumps({"architecture": NAME}).encode()
    first = cache("timm/vit.a1", {"model.safetensors": weights(tmp_path), "config.json": config})
    second = cache("timm/vit.a1", {"model.safetensors": weights(tmp_path, 2.0)}, "v2", "1" * 40)
    assert hub_file("hf-hub:timm/vit.a1") == hub_file("hf_hub:timm/vit.a1@main") == first / "model.safetensors"
    assert (
        hub_file("hf-hub:timm/vit.a1@v2") == hub_file(f"hf-hub:timm/vit.a1@{'1' * 40}") == second / "model.safetensors"
    )
    got = read(hub_file("hf-hub:timm/vit.a1"))
    assert got.facts.timm == {"architecture": NAME} and torch.equal(got.state["w"], torch.ones(2))


def test_shards_in_the_cache_are_refused_or_a_lost_one_is_not_named(cache, tmp_path):
    index = json.dumps(
        {"weight_map": {"w": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}
    )
    files = {"model.safetensors.index.json": index.encode(), "model-00001-of-00002.safetensors": weights(tmp_path)}
    snapshot = cache("a/b", files)
    with pytest.raises(FileNotFoundError, match="'hf-hub:a/b': model-00002-of-00002.safetensors, which"):
        hub_file("hf-hub:a/b")
    (snapshot / "model-00002-of-00002.safetensors").symlink_to(
        (snapshot / "model-00001-of-00002.safetensors").resolve()
    )
    assert [*read(hub_file("hf-hub:a/b")).state] == ["w"]


@pytest.mark.parametrize("name", ["hf-hub:a/absent", "hf-hub:a/b@absent"])
def test_offline_and_not_cached_is_a_traceback_or_a_call(name, cache, tmp_path):
    cache("a/b", {"model.safetensors": weights(tmp_path)})
    with pytest.raises(FileNotFoundError, match=rf"'{name}'.*cache '{tmp_path}/hub'.*HF_HUB_OFFLINE.*HF_HOME") as error:
        hub_file(name)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["hf-hub:a", "hf-hub:../b", "hf-hub:a/..", "hf-hub:a/b@../../c", "hf-hub:a/b@", "a/b"])
def test_name_that_is_none_of_the_hub_is_looked_up(name, cache):
    with pytest.raises(ValueError, match="must be 'hf-hub:owner/name'"):
        hub_file(name)
    assert is_hub_name(name) == name.startswith("hf-hub:")
