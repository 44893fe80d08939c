"""`vitfast parity`: its exit status, what it reads and what it refuses."""

import json
import struct
import zlib

import pytest
import torch
import transformers
from PIL import Image
from torch import nn

import vitfast
from vitfast.commands import main as command
from vitfast.commands import parity
from vitfast.parity.pictures import image_of
from vitfast.parity.sources import model_of

PIXELS = (3, 16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def run(capsys, *words):
    """Exit status and what was printed."""
    try:
        status = command.main(["parity", *map(str, words)])
    except SystemExit as wrong:
        status = wrong.code
    said = capsys.readouterr()
    return status, said.out, said.err


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One model as a folder of transformers, as our checkpoint, and as one with another eps and another weight."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, image_size=32, patch_size=8,
        num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "hf")
    (folder / "hf/preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32, "width": 32}, "resample": 2}
        )
    )
    ours = vitfast.load(model)
    vitfast.save_checkpoint(ours, folder / "same.safetensors")
    for module in ours.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    ours.config = ours.config.replace(norm_eps=1e-5)
    vitfast.save_checkpoint(ours, folder / "eps.safetensors")
    return folder


def test_parity_is_no_status_of_zero(files, capsys):
    status, out, err = run(capsys, files / "hf", files / "same.safetensors")
    assert (status, err) == (0, "") and out.splitlines()[-1].startswith("parity:")
    assert out.splitlines()[0] == "a: transformers.models.vit.modeling_vit.ViTForImageClassification"


def test_difference_is_no_status_of_one(files, capsys):
    status, out, _ = run(capsys, f"hf:{files / 'hf'}", files / "eps.safetensors", "--dtype", "bf16")
    assert status == 1 and "no parity, first at blocks.0.attn" in out
    assert "an eps of 1e-05 in place of 1e-12" in out.splitlines()[-1]
    status, out, _ = run(capsys, files / "hf", files / "eps.safetensors", "--json")
    found = json.loads(out)
    assert status == 1 and found["first"] == "blocks.0.attn" and found["diagnosis"]["names"] == ["eps"]
    assert found["dtype"] == "fp32"


def test_names_do_not_share_weights(capsys):
    """Two names of random weights would differ in everything."""
    for a, b in (("timm:test_vit", "vitfast:test_vit"), ("vitfast:test_vit", "timm:test_vit")):
        status, out, err = run(capsys, a, b, "--size", "160")
        assert (status, err) == (0, "") and "parity:" in out


def test_kernels_are_not_compared_with_stock_operators(capsys, files, monkeypatch):
    """Our model with ops against the same on stock operators; another library's against itself patched."""
    seen = []
    real = parity.compare
    monkeypatch.setattr(parity, "compare", lambda a, b, *args, **how: seen.append((a, b)) or real(a, b, *args, **how))
    for text in (files / "same.safetensors", files / "hf"):
        status, out, err = run(capsys, text, "--kernels", "--gradients")
        assert (status, err) == (0, "") and "gradient of its input" in out
    (stock, own), (theirs, patched) = seen
    assert stock.exportable and not own.exportable
    assert not any("_vitfast" in vars(m) for m in theirs.modules()) and any(
        "_vitfast" in vars(m) for m in patched.modules()
    )


def test_torchvision_is_not_known(capsys, monkeypatch):
    from torchvision import models

    def small(name, weights=None):
        return models.VisionTransformer(32, 8, 2, 2, 64, 128, num_classes=5)

    monkeypatch.setattr(models, "get_model", small)
    model = model_of("torchvision:vit_b_16")
    assert model.pretrained_cfg["input_size"] == (3, 32, 32)
    with pytest.raises(ValueError, match="torchvision has no model 'vit_z'"):
        model_of("torchvision:vit_z")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["timm:test_vit"], "B is required, or --kernels in its place"),
        (["timm:test_vit", "timm:test_vit", "--kernels"], "B is required"),
        (["timm:test_vit", "vitfast:test_vit", "--device", "quantum"], "quantum"),
        (["nothing", "timm:test_vit"], "a model must be given as vitfast:NAME, timm:NAME"),
        (["timm:test_vit", "timm:no_such_model"], "timm:no_such_model: "),
        (["timm:test_vit", "vitfast:test_vit2"], "the other model's weights do not fit"),
        (["timm:test_vit", "vitfast:test_vit", "--size", "0"], "--size"),
        (["timm:test_vit", "vitfast:test_vit", "--size", "33"], "33"),
        (["timm:test_vit", "vitfast:test_vit", "--dtype", "int8"], "invalid choice"),
        (["timm:test_vit", "vitfast:test_vit", "--image", "no.png"], "no.png must be a picture"),
        (["timm:test_vit", "vitfast:test_vit", "--tap", "tokens"], "STAGE=VALUE"),
        (["timm:test_vit", "vitfast:test_vit", "--plot", "x.txt"], "--plot must be a file of"),
        (["no.onnx", "vitfast:test_vit"], "no.onnx"),
    ],
)
def test_wrong_use_is_no_status_of_two(words, says, capsys):
    status, out, err = run(capsys, *words)
    assert status == 2 and says in err and "Traceback" not in err
    assert out == ""


def test_picture_of_the_error_is_not_drawn(files, capsys, tmp_path):
    status, _, err = run(capsys, files / "hf", files / "eps.safetensors", "--plot", tmp_path / "depth.png")
    assert (status, err) == (1, "")
    assert Image.open(tmp_path / "depth.png").size[0] > 400 and len(list(tmp_path.iterdir())) == 1


def test_preparation_is_told_last(files, capsys):
    status, out, _ = run(capsys, files / "hf", files / "eps.safetensors", "--field", "norm_eps=1e-12")
    lines = out.splitlines()
    told = [i for i, line in enumerate(lines) if line.startswith("images are prepared otherwise")]
    assert all(i < 6 for i in told)
    assert status == 0, out


def test_image_of_a_file_is_other_pixels(files, capsys, tmp_path):
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    picture.save(tmp_path / "red.png")
    pixels = image_of(tmp_path / "red.png", *PIXELS)
    assert pixels.shape == (3, 16, 16)
    assert torch.equal(pixels, torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 16, 16))
    status, _, err = run(
        capsys, files / "hf", files / "same.safetensors", "--image", tmp_path / "red.png", "--size", "32x32"
    )
    assert (status, err) == (0, "")


def test_turned_grey_or_transparent_picture_is_other_pixels(tmp_path):
    """EXIF's orientation, palettes, CMYK, 16 bits and transparency."""
    halves = Image.new("RGB", (16, 16))
    halves.paste((255, 255, 255), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    halves.save(tmp_path / "turned.png", exif=exif)
    assert image_of(tmp_path / "turned.png", *PIXELS)[:, 8, [0, 15]].tolist() == [[-1.0, 1.0]] * 3
    halves.convert("P").save(tmp_path / "palette.png")
    assert image_of(tmp_path / "palette.png", *PIXELS)[:, 8, [0, 15]].tolist() == [[1.0, -1.0]] * 3
    Image.new("I;16", (16, 16), 257 * 255).save(tmp_path / "deep.png")
    assert (image_of(tmp_path / "deep.png", *PIXELS) == 1).all()
    Image.new("RGBA", (16, 16), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert (image_of(tmp_path / "clear.png", *PIXELS) == 1).all()
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(tmp_path / "ink.jpg")
    assert (image_of(tmp_path / "ink.jpg", *PIXELS) > 0.98).all()
    assert image_of(tmp_path / "turned.png", (1, 16, 16), (0.5,), (0.5,)).shape == (1, 16, 16)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_hostile_picture_is_decoded(tmp_path):
    """Of 10 gigapixels, of another format, cut off, of several frames."""
    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100)))
    (tmp_path / "bomb.png").write_bytes(bomb)
    large = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 8_001, 8_000, 8, 2, 0, 0, 0))
    (tmp_path / "large.png").write_bytes(large + chunk(b"IDAT", zlib.compress(bytes(100))))
    Image.new("RGB", (16, 16)).save(tmp_path / "x.gif")
    Image.new("RGB", (160, 160), (1, 2, 3)).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:60])
    frames = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in (0, 200)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    said = {"bomb.png": "picture", "large.png": "at most 64000000 pixels", "x.gif": "picture", "cut.png": "picture",
            "moving.webp": "2 frames"}  # fmt: skip
    for name, why in said.items():
        with pytest.raises(ValueError, match=f"{name} must .*{why}"):
            image_of(tmp_path / name, *PIXELS)


def test_help_does_not_say_what_a_model_may_be(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0 and "vitfast:NAME" in out and "FILE.onnx" in out
    assert parity.DTYPES.keys() == {"fp32", "fp16", "bf16"}


def test_two_models_of_nan_are_alike(tmp_path):
    model = vitfast.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5)
    with torch.no_grad():
        model.blocks[0].norm1.weight[0] = torch.nan
    found = vitfast.compare(model, model, torch.randn(1, 3, 32, 32))
    assert not found.ok and found.first == "blocks.0.attn"


@pytest.mark.parametrize("wrong", [["--tap", "tokens=x"], ["--field", "bogus=3"], ["--plot", "/nowhere/x.png"]])
def test_option_that_means_nothing_is_passed_over(wrong, capsys):
    with pytest.raises(SystemExit) as stop:
        parity.main(["vitfast:test_vit", "vitfast:test_vit", *wrong])
    assert stop.value.code == 2 and wrong[0] in capsys.readouterr().err
