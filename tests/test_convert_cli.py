"""`vitfast convert`: exit status, what it prints, and that an error of its user never ends in a traceback."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_convert_same import timms
from test_load import SMALL, filled

import vitfast
from vitfast.commands import convert as command
from vitfast.commands.main import main
from vitfast.loading import convert as module

transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Weights whole and broken: of timm, of Hugging Face in shards, of CLIP, two sets in one file, none."""
    here = tmp_path_factory.mktemp("made")
    model, _ = timms(img_size=32)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    save_file(state, here / "m.safetensors")
    torch.save(state, here / "m.pth")
    torch.save({"teacher": state, "student": {name: w + 1 for name, w in state.items()}}, here / "two.pth")
    config = transformers.ViTConfig(**SMALL, num_labels=4, id2label={i: f"class {i}" for i in range(4)})
    filled(transformers.ViTForImageClassification(config)).save_pretrained(here / "vit", max_shard_size="200KB")
    config = transformers.CLIPVisionConfig(**SMALL | {"hidden_size": 128, "num_attention_heads": 2})
    save_file(transformers.CLIPVisionModel(config).state_dict(), here / "clip.safetensors")
    save_file({"layer1.0.conv1.weight": torch.ones(2, 2, 3, 3)}, here / "resnet.safetensors")
    save_file({name: w for name, w in state.items() if name != "blocks.1.norm1.bias"}, here / "broken.safetensors")
    (here / "text.safetensors").write_text("no weights")
    (here / "half.safetensors").write_bytes((here / "m.safetensors").read_bytes()[:100_000])
    (here / "text.pth").write_text("no weights")
    (here / "empty.safetensors").touch()
    (here / "folder").mkdir()
    return here


@pytest.fixture
def folder(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return Path(shutil.copytree(made, tmp_path, dirs_exist_ok=True))


def told(capsys, *arguments):
    """Exit status, stdout and stderr of `vitfast convert`."""
    try:
        status = main(["convert", *map(str, arguments)])
    except SystemExit as exit_:
        status = exit_.code
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return status, printed.out, printed.err


def names(folder):
    return {path.name for path in folder.iterdir()}


def test_it_is_not_written_or_not_said(folder, capsys):
    status, out, err = told(capsys, "m.safetensors", "hf", "--to", "hf")
    assert (status, err) == (0, "")
    assert out.startswith("m.safetensors: weights of timm (timm)") and "assumed heads = 3: as vit_tiny" in out
    assert out.endswith("written to hf under the names of hf\n")
    found = transformers.AutoModelForImageClassification.from_pretrained("hf")
    assert torch.equal(found.classifier.weight, load_file("m.safetensors")["head.weight"])
    assert told(capsys, "hf", "back.safetensors")[0] == 0
    found = load_file("back.safetensors")
    assert all(torch.equal(found[name], value) for name, value in load_file("m.safetensors").items())
    # timm is the default, and knows the folder
    assert told(capsys, "m.safetensors", "t")[0] == 0
    assert timm.create_model("local-dir:t", pretrained=True).pretrained_cfg["num_classes"] == 10


OPTIONS = [
    (["--num-classes", "3"], lambda m: m.config.num_classes == 3 and not m.head.weight.any()),
    (["--image-size", "48"], lambda m: m.config.image_size == (48, 48)),
    (["--image-size", "48x32"], lambda m: m.config.image_size == (48, 32)),
    (["--patch-size", "8", "--image-size", "16"], lambda m: m.config.patch_size == (8, 8)),
    (["--channels", "1"], lambda m: m.config.channels == 1),
    (["--field", "activation=quick_gelu"], lambda m: m.config.activation == "quick_gelu"),
    (["--field", "heads=6", "--field", "norm_eps=1e-5"], lambda m: (m.config.heads, m.config.norm_eps) == (6, 1e-5)),
    (["--field", "dynamic_image_size=true"], lambda m: m.config.dynamic_image_size is True),
    (["--field", "dynamic_image_size=False"], lambda m: m.config.dynamic_image_size is False),
    (["--as", "timm"], lambda m: m.config.num_classes == 10),
]


@pytest.mark.parametrize(("options", "so"), OPTIONS, ids=range(len(OPTIONS)))
def test_option_is_not_heard(options, so, folder, capsys):
    status, _, err = told(capsys, "m.safetensors", "o.safetensors", "--to", "vitfast", *options)
    assert (status, err) == (0, "")
    assert so(vitfast.load("o.safetensors"))


def test_dtype_resampling_or_key_is_not_heard(folder, capsys):
    for dtype, wanted in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        assert told(capsys, "m.safetensors", f"{dtype}.safetensors", "--dtype", dtype)[0] == 0
        assert {w.dtype for w in load_file(f"{dtype}.safetensors").values()} == {wanted}
    pixels = ("--image-size", "64")
    for mode in ("timm", "hf"):
        assert told(capsys, "m.safetensors", f"{mode}.safetensors", *pixels, "--resampling", mode)[0] == 0
    one, other = (load_file(f"{mode}.safetensors")["pos_embed"] for mode in ("timm", "hf"))
    assert one.shape == other.shape and not torch.equal(one, other)
    status, _, err = told(capsys, "two.pth", "x.pth", "--allow-pickle")
    assert status == 1 and "'teacher'" in err and "'student'" in err
    assert told(capsys, "two.pth", "x.pth", "--allow-pickle", "--key", "student")[0] == 0
    written = torch.load("x.pth", weights_only=True)["cls_token"]
    assert torch.equal(written, load_file("m.safetensors")["cls_token"] + 1)


WRONG = [
    (["m.safetensors"], "give OUT, or --inspect without it"),
    (["m.safetensors", "x", "--inspect"], "give OUT, or --inspect without it"),
    (["m.safetensors", "x", "--to", "keras"], "--to: invalid choice: 'keras'"),
    (["m.safetensors", "x", "--as", "keras"], "--as: invalid choice: 'keras'"),
    (["m.safetensors", "x", "--nonsense"], "--nonsense"),
    (["m.safetensors", "x", "--num-classes", "many"], "--num-classes: must be a number, got 'many'"),
    (["m.safetensors", "x", "--num-classes", "-1"], "--num-classes"),
    (["m.safetensors", "x", "--image-size", "0"], "--image-size: must be more than 0, got '0'"),
    (["m.safetensors", "x", "--image-size", "1x2x3"], "--image-size: must be a number, got '2x3'"),
    (["m.safetensors", "x", "--grid", "2x"], "--grid: must be a number, got ''"),
    (["m.safetensors", "x", "--field", "heads"], "--field must be NAME=VALUE with a field of ViTConfig, got 'heads'"),
    (["m.safetensors", "x", "--field", "haeds=3"], "--field must be NAME=VALUE"),
    (["m.safetensors", "vit"], "'vit' is there; force=True (--force) replaces it"),
    (["m.safetensors", "x.pth", "--to", "hf"], "out must be a folder for to='hf', got 'x.pth'"),
    (["m.safetensors", "x", "--to", "torchvision"], "out must end in .safetensors"),
    (["m.safetensors", "none/x"], "no folder 'none'"),
    (["clip.safetensors", "x"], "activation must be given, activation='quick_gelu' or activation='gelu'"),
    (["clip.safetensors", "--inspect"], "(--field NAME=VALUE, or the option of that name)"),
]
REFUSED = [
    (["none.safetensors", "x"], "no file 'none.safetensors'"),
    (["m.pth", "x"], "--allow-pickle|allow_pickle=True"),
    (["text.safetensors", "x"], "is not a whole safetensors file"),
    (["half.safetensors", "x"], "is not a whole safetensors file"),
    (["text.pth", "x", "--allow-pickle"], "is not a whole file of plain weights"),
    (["empty.safetensors", "x"], "is empty"),
    (["folder", "x"], "path must be a file, or a folder with model.safetensors"),
    (["resnet.safetensors", "x"], "weights must be those of a ViT in any layout that is known"),
    (["broken.safetensors", "x"], "missing: blocks.1.norm1.bias"),
    (["m.safetensors", "x.pth", "--to", "vit_pytorch"], "vit-pytorch's ViT has norms on both sides"),
    (["m.safetensors", "x", "--to", "hf", "--field", "pool=mean"], "pool"),
    (["m.safetensors", "x", "--as", "hf-vit"], "weights must be those of Hugging Face's ViT"),
    (["m.safetensors", "x", "--field", "heads=5"], "must become blocks.0.attn.qkv.weight"),
    (["hf-hub:no/such", "x"], "hf-hub:no/such"),
]


@pytest.mark.parametrize(("arguments", "said"), WRONG, ids=str)
def test_wrong_use_is_accepted_or_not_explained(arguments, said, folder, capsys):
    before = names(folder)
    status, out, err = told(capsys, *arguments)
    assert (status, out) == (2, "") and said in err and "vitfast convert" in err
    assert names(folder) == before


@pytest.mark.parametrize(("arguments", "said"), REFUSED, ids=str)
def test_broken_source_is_written_or_not_explained(arguments, said, folder, capsys):
    before = names(folder)
    status, out, err = told(capsys, *arguments)
    assert (status, out) == (1, "") and any(each in err for each in said.split("|")), err
    assert err.startswith("vitfast convert: ") and names(folder) == before


def test_force_is_not_heard_or_failure_is_not_told(folder, capsys, monkeypatch):
    assert told(capsys, "m.safetensors", "vit", "--force")[0] == 0
    assert names(folder / "vit") == {"model.safetensors", "config.json"}
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "save_file", fails)
    status, out, err = told(capsys, "m.safetensors", "vit", "--force", "--num-classes", "3")
    assert (status, out) == (1, "") and "No space left on device" in err

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_file", interrupted)
    status, out, err = told(capsys, "m.safetensors", "vit", "--force", "--num-classes", "3")
    assert (status, out, err) == (130, "", "vitfast convert: stopped; nothing was written\n")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_nan_is_not_told_or_told_as_a_line_of_source(folder, capsys):
    state = load_file("m.safetensors")
    state["norm.bias"][0] = torch.nan
    save_file(state, "nan.safetensors")
    status, out, err = told(capsys, "nan.safetensors", "x.safetensors")
    assert status == 0 and err == "vitfast convert: convert: nan.safetensors has NaN or Inf in norm.bias\n"
    assert "NaN or Inf in norm.bias" in out
    status, out, err = told(capsys, "nan.safetensors", "--inspect")
    assert status == 0 and "NaN or Inf in norm.bias" in out


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_inspect_writes_or_leaves_something_out(folder, capsys):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    status, out, err = told(capsys, "m.safetensors", "--inspect", "--num-classes", "3")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "m.safetensors: weights of timm (timm): patch_embed.proj and blocks.0.attn.qkv are there"
    assert any(line.startswith("  assumed norm_eps = 1e-06: as vit_tiny") for line in lines)
    assert "  classifier: a new one, zero, for 3 classes in place of 10" in lines
    assert "  config: image_size=(32, 32), num_classes=10, dim=192, depth=2, heads=3, mlp_dim=768" in lines
    size = (folder / "m.safetensors").stat().st_size
    assert lines[-1] == f"  m.safetensors: {size:,} bytes, sha256 {sha256(folder / 'm.safetensors')}"
    status, out, _ = told(capsys, "vit", "--inspect")
    assert "4 labels, the first 'class 0'" in out
    files = sorted(path for path in (folder / "vit").iterdir() if path.name.startswith("model"))
    assert len(files) > 2 and all(f"{path.name}: " in out and sha256(path) in out for path in files)
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}
    assert after == before


KEYS = {
    "source", "layout", "whose", "why", "prefix", "config", "assumed", "ignored", "changed", "preprocessing", "labels",
    "not_finite", "chosen",
}  # fmt: skip


def test_json_is_not_json_or_differs_from_the_text(folder, capsys):
    status, out, err = told(capsys, "vit", "o.safetensors", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and found.keys() == KEYS | {"out", "to"}
    assert (found["layout"], found["out"], found["to"], found["labels"]["3"]) == (
        "hf-vit", "o.safetensors", "timm", "class 3",
    )  # fmt: skip
    assert vitfast.ViTConfig(**found["config"]) == vitfast.load("vit").load_report.config
    assert any("config.json is not written" in each for each in found["changed"])
    status, out, err = told(capsys, "m.safetensors", "--inspect", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "") and found.keys() == KEYS | {"parameters", "bytes", "files"}
    state = load_file("m.safetensors")
    assert found["parameters"] == sum(w.numel() for w in state.values())
    assert found["bytes"] == {"float32": sum(w.nbytes for w in state.values())}
    (file,) = found["files"]
    assert file == {
        "file": "m.safetensors", "bytes": (folder / "m.safetensors").stat().st_size,
        "sha256": sha256(folder / "m.safetensors"),
    }  # fmt: skip


def test_help_leaves_an_option_out(capsys):
    status, out, _ = told(capsys, "--help")
    options = [option for action in command._parser()._actions for option in action.option_strings]
    assert status == 0 and all(option in out for option in options) and len(options) > 15


def test_an_own_process_ends_in_a_traceback(folder):
    run = lambda *a: subprocess.run(  # noqa: E731
        [sys.executable, "-m", "vitfast", "convert", *a], capture_output=True, text=True
    )
    found = run("broken.safetensors", "x")
    assert found.returncode == 1 and "missing: blocks.1.norm1.bias" in found.stderr
    assert "Traceback" not in found.stderr and not found.stdout
