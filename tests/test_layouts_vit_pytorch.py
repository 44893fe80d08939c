"""vit-pytorch's weights of all its releases: taken for another era's, for another model's, or written wrongly."""

import pytest
import torch
import vit_pytorch
import vit_pytorch_eras as eras
from safetensors.torch import save_file
from vit_pytorch.cait import CaiT
from vit_pytorch.deepvit import DeepViT
from vit_pytorch.mae import MAE
from vit_pytorch.parallel_vit import ViT as ParallelViT
from vit_pytorch.simple_vit import SimpleViT
from vit_pytorch.simple_vit_with_register_tokens import SimpleViT as SimpleViTWithRegisters
from vit_pytorch.vit_detpool import ViTDetPool
from vit_pytorch.vit_for_small_dataset import ViT as SmallDatasetViT
from vit_pytorch.vit_with_patch_merger import ViT as MergerViT

import vitfast
from vitfast.weights.layouts import LAYOUTS
from vitfast.weights.layouts.layout import NeedsArgument, written

ARGUMENTS = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=2, heads=2, mlp_dim=48, dim_head=16)
LAYOUT = {layout.name: layout for layout in LAYOUTS}


def filled(model, std=0.15):
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            weight.normal_(std=std).add_(float(weight.dim() == 1 and name.endswith("weight")))
    return model.eval()


def double(state):
    return {name: weight.double() for name, weight in state.items()}


def needed(kind, pool, image):
    """What no release's weights tell: heads of 16 channels, the way of pooling, SimpleViT's image size."""
    simple = {"image_size": image, "grid": None} if kind == "SimpleViT" else {}
    return {"heads": 2, "grid": (image[0] // 8, image[1] // 8)} | ({"pool": "mean"} if pool == "mean" else {}) | simple


def near(found, expected, bound=1e-12):
    return found.shape == expected.shape and (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("image", [(32, 32), (40, 24)])
@pytest.mark.parametrize(("release", "kind", "pool"), eras.MODELS)
def test_a_release_is_taken_for_another(release, kind, pool, image):
    """Norms before or after pooling, the class token in the mean or not, pixels in their order, heads."""
    state = eras.drawn(release, kind, pool, image)
    ours = vitfast.load(dict(state), **needed(kind, pool, image), dtype=torch.float64)
    images = torch.randn(2, 3, *image, dtype=torch.float64)
    # SimpleViT computes its positions in fp32
    bound = 1e-6 if kind == "SimpleViT" else 1e-12
    with torch.no_grad():
        assert near(ours(images), eras.logits(double(state), images, pool), bound)
        tokens, after = eras.tokens(double(state), images), ours.config.norm_after_pool
        head = [name for name in ("mlp_head.0", "linear_head.0") if f"{name}.weight" in state]
        expected = eras.norm(double(state), head[0], tokens) if head and not after else tokens
        assert near(ours.forward_features(images), expected, bound)


def test_names_of_the_installed_release_are_others_than_the_recorded():
    """The file of the newest era is then no more what users have."""
    for pool in ("cls", "mean"):
        model = vit_pytorch.ViT(**ARGUMENTS, pool=pool)
        found = {name: list(weight.shape) for name, weight in model.state_dict().items()}
        assert found == eras.recorded("1.26.11", "ViT", pool)
    model = SimpleViT(**ARGUMENTS)
    assert {n: list(w.shape) for n, w in model.state_dict().items()} == eras.recorded("1.26.11", "SimpleViT", "mean")


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"pool": "mean"}, {"num_classes": 0}, {"heads": 1, "dim_head": 32}, {"heads": 3, "dim_head": 64},
        {"patch_size": (8, 4)}, {"channels": 1}, {"channels": 4}, {"dropout": 0.2, "emb_dropout": 0.1},
    ],
    ids=str,
)  # fmt: skip
def test_a_model_in_memory_is_taken_for_another(changes):
    """All that its modules tell is taken from them; in the file the same weights tell less."""
    theirs = filled(vit_pytorch.ViT(**ARGUMENTS | changes)).double()
    ours = vitfast.load(theirs, dtype=torch.float64, **({"grid": (4, 8)} if "patch_size" in changes else {}))
    expected = vitfast.ViT(**ARGUMENTS | changes).config
    assert ours.config == expected and not ours.load_report.assumed.keys() - {"pool", "patch_size"}
    # smaller images have the first positions there
    for size in (32, 16):
        images = torch.randn(2, changes.get("channels", 3), 32, size, dtype=torch.float64)
        assert near(ours(images), theirs(images))


def test_simple_vit_in_memory_is_taken_for_another():
    theirs = filled(SimpleViT(**ARGUMENTS | {"image_size": (32, 48), "patch_size": (8, 4)})).double()
    ours = vitfast.load(theirs, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert near(ours(images), theirs(images)) and ours.config.image_size == (32, 48)
    with pytest.raises(ValueError, match="32"):
        ours(images[..., :32])
    # its positions are computed for each size, not resampled
    larger = filled(SimpleViT(**ARGUMENTS | {"image_size": 64})).double()
    larger.load_state_dict(filled(SimpleViT(**ARGUMENTS)).state_dict())
    ours = vitfast.load(larger.state_dict(), image_size=64, heads=2, dtype=torch.float64)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert near(ours(images), larger(images)) and not ours.load_report.changed


def test_attention_of_another_scale_is_taken_for_the_usual():
    theirs = vit_pytorch.ViT(**ARGUMENTS)
    for attention, _ in theirs.transformer.layers:
        attention.scale = 32**-0.5
    with pytest.raises(NotImplementedError, match=r"scale must be head_dim \*\* -0.5, 0.25, got 0.17"):
        vitfast.load(theirs)


def test_what_weights_do_not_tell_is_guessed():
    state = eras.drawn("1.26.11")
    with pytest.raises(NeedsArgument, match="heads must be given.*32 is no multiple of 64"):
        vitfast.load(dict(state))
    with pytest.raises(NeedsArgument, match="image_size must be given.*positions are computed"):
        vitfast.load(eras.drawn("1.26.11", "SimpleViT", "mean"), heads=2)
    with pytest.raises(NeedsArgument, match="grid must be given.*15 patches"):
        vitfast.load(eras.drawn("1.26.11", image=(40, 24)), heads=2)
    theirs = filled(vit_pytorch.ViT(**ARGUMENTS | {"patch_size": (8, 4)}))
    with pytest.raises(NeedsArgument, match="patch_size must be given.*96 pixels"):
        vitfast.load(theirs.state_dict(), heads=2, grid=(4, 8))
    images = torch.randn(1, 3, 32, 32)
    ours = vitfast.load(theirs.state_dict(), heads=2, grid=(4, 8), patch_size=(8, 4))
    assert near(ours(images), theirs(images), 1e-5)
    four = filled(vit_pytorch.ViT(**ARGUMENTS | {"channels": 4}))
    images = torch.randn(1, 4, 32, 32)
    assert near(vitfast.load(four.state_dict(), heads=2, channels=4)(images), four(images), 1e-5)


def test_assumptions_are_not_said():
    theirs = vit_pytorch.ViT(**ARGUMENTS | {"dim_head": 64})
    assumed = vitfast.load(theirs.state_dict()).load_report.assumed
    assert assumed.keys() == {"heads", "patch_size"} and "dim_head=64" in assumed["heads"]
    # two ways of pooling have the same weights until 1.16.0, which still had the batch dim
    assert "pool='mean' too" in vitfast.load(eras.drawn("1.6.9"), heads=2).load_report.assumed["pool"]
    bare = vitfast.load(vit_pytorch.ViT(**ARGUMENTS | {"num_classes": 0}).state_dict(), heads=2)
    assert bare.config.pool == "none" and "1.17.3" in bare.load_report.assumed["pool"]
    headed = vitfast.load(vit_pytorch.ViT(**ARGUMENTS | {"num_classes": 0}).state_dict(), heads=2, num_classes=7)
    assert headed(torch.randn(1, 3, 32, 32)).shape == (1, 7)


def test_encoder_inside_of_pretraining_is_not_found(tmp_path):
    for encoder, given in ((vit_pytorch.ViT(**ARGUMENTS), {}), (SimpleViT(**ARGUMENTS), {"image_size": 32})):
        encoder = filled(encoder)
        state = {name: weight.clone() for name, weight in MAE(encoder=encoder, decoder_dim=16).state_dict().items()}
        save_file(state, tmp_path / "mae.safetensors")
        ours = vitfast.load(tmp_path / "mae.safetensors", heads=2, **given)
        images = torch.randn(1, 3, 32, 32)
        assert near(ours(images), encoder(images), 1e-5)
        assert "decoder of masked pretraining" in str(ours.load_report)


OTHERS = {
    "DeepViT": lambda: DeepViT(**ARGUMENTS),
    "CaiT": lambda: CaiT(**ARGUMENTS, cls_depth=1),
    "ViT for small datasets": lambda: SmallDatasetViT(**ARGUMENTS),
    "ViT with a patch merger": lambda: MergerViT(**ARGUMENTS),
    "parallel ViT": lambda: ParallelViT(**ARGUMENTS),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_of_vit_pytorch_is_loaded_or_has_no_name(name):
    with pytest.raises(NotImplementedError, match=f"these are weights of vit-pytorch's {name}"):
        vitfast.load(OTHERS[name]().state_dict())


def test_class_token_of_another_kind_is_a_traceback():
    with pytest.raises(ValueError, match="must be those of a ViT in any layout that is known"):
        vitfast.load(ViTDetPool(**ARGUMENTS).state_dict(), heads=2)


def test_weights_beside_the_usual_are_dropped():
    with pytest.raises(RuntimeError, match="unexpected: register_tokens"):
        vitfast.load(SimpleViTWithRegisters(**ARGUMENTS).state_dict(), heads=2, image_size=32)
    # an older one: attention of another scale under the same names, but for the first
    state = eras.drawn("0.9.3")
    for kind in ("weight", "bias"):
        state[f"patch_to_embedding.{kind}"] = state.pop(f"to_patch_embedding.1.{kind}")
    with pytest.raises(NotImplementedError, match=r"before 0\.7\.0.*dim \*\* -0\.5.*renamed"):
        vitfast.load(state, heads=2)


@pytest.mark.parametrize(("release", "kind", "pool"), eras.MODELS)
def test_what_is_written_is_not_what_was_read(release, kind, pool):
    """Names of the newest release of an era: 0.40.2 for 0.9.3, 1.26.11 for 1.16.0."""
    state = eras.drawn(release, kind, pool)
    ours = vitfast.load(dict(state), **needed(kind, pool, (32, 32)))
    layout = LAYOUT[ours.load_report.layout]
    again = written(layout, ours.state_dict(), ours.config)
    newest = {"0.9.3": "0.40.2", "1.16.0": "1.26.11"}.get(release, release)
    own = eras.recorded(newest, kind, pool)
    assert again.keys() == own.keys()
    if release != "1.6.9":  # which had the batch dim
        assert {name: list(weight.shape) for name, weight in again.items()} == own
    rest = vitfast.load(dict(again), **needed(kind, pool, (32, 32)))
    assert rest.config == ours.config
    assert all(torch.equal(weight, rest.state_dict()[name]) for name, weight in ours.state_dict().items())
    if newest == release != "1.6.9":
        assert all(torch.equal(weight, state[name]) for name, weight in again.items())


# whose norms, tokens and pooling the newest ViT has
HELD = {
    *((release, "ViT", "cls") for release in ("1.2.9", "1.6.9", "1.16.0", "1.26.11")),
    *((release, "ViT", "mean") for release in ("1.16.0", "1.26.11")),
    *((release, "SimpleViT", "mean") for release in ("1.6.9", "1.16.0", "1.26.11")),
}


@pytest.mark.parametrize(("release", "kind", "pool"), eras.MODELS)
def test_another_model_is_written_for_the_newest_release(release, kind, pool, tmp_path):
    """Which reads what it can hold: norms of pixels, a norm before pooling, a class token or the mean of patches."""
    ours = vitfast.load(eras.drawn(release, kind, pool), **needed(kind, pool, (32, 32)))
    write = lambda: vitfast.convert(ours, tmp_path / "m.pt", "vit_pytorch")  # noqa: E731
    if (release, kind, pool) not in HELD:
        with pytest.raises(NotImplementedError, match="vit-pytorch's ViT"):
            write()
        return
    write()
    theirs = vit_pytorch.ViT(**ARGUMENTS, pool=pool).eval()
    theirs.load_state_dict(torch.load(tmp_path / "m.pt"))
    images = torch.randn(2, 3, 32, 32)
    assert near(theirs(images), ours(images), 1e-5)


def test_simple_vit_is_written_without_what_it_does_not_have():
    layout = LAYOUT["vit-pytorch-simple"]
    ours = vitfast.load(eras.drawn("1.26.11", "SimpleViT", "mean"), heads=2, image_size=32)
    for name, said in (("blocks.1.attn.proj.bias", "bias in attention"), ("pos_embed", "positions are computed")):
        state = {each: weight.clone() for each, weight in ours.state_dict().items()}
        state[name].view(-1)[3] += 1
        with pytest.raises(NotImplementedError, match=said):
            written(layout, state, ours.config)


@pytest.mark.parametrize(("release", "kind", "pool"), eras.MODELS)
def test_weights_go_into_a_model_that_is_there_as_another_era(release, kind, pool):
    """What they do not tell is as the model has it."""
    state = eras.drawn(release, kind, pool)
    ours = vitfast.load(dict(state), **needed(kind, pool, (32, 32)))
    model = vitfast.ViT.from_config(ours.config).eval()
    vitfast.load_checkpoint(model, dict(state))
    assert all(torch.equal(weight, ours.state_dict()[name]) for name, weight in model.state_dict().items())


def test_other_sizes_are_refused_or_not_said():
    old = vitfast.load(eras.drawn("0.40.2"), heads=2, image_size=48, channels=1, num_classes=7)
    assert old(torch.randn(1, 1, 48, 48)).shape == (1, 7)
    assert [change.split(":")[0] for change in old.load_report.changed] == [
        "classifier",
        "patch projection",
        "positions",
    ]
    new = vitfast.load(eras.drawn("1.26.11"), heads=2, image_size=48)
    assert new(torch.randn(1, 3, 48, 48)).shape == (1, 5) and "6x6 in place of 4x4" in str(new.load_report)
    with pytest.raises(NotImplementedError, match="channels must stay 3"):
        vitfast.load(eras.drawn("1.2.9"), heads=2, channels=1)
