"""What was exchanged in a model before it was saved: the file describes the model as it is, or saving says why not.

Silent would be the worst: weights that load into a model which computes something else.
"""

import copy
import os
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import vitfast
from vitfast.checkpoints.described import config_of
from vitfast.model.block import Attention
from vitfast.model.layers import DropPath, LayerScale, QuickGELU
from vitfast.weights.resample import resample_pos_embed

SIZES = dict(image_size=16, patch_size=8, num_classes=5, dim=32, depth=3, heads=2, mlp_dim=48)
RATES = dict(
    emb_dropout=0.1, attn_dropout=0.15, proj_dropout=0.2, mlp_dropout=0.25, head_dropout=0.3, drop_path=0.4
)  # fmt: skip
GATED = dict(activation="silu", proj_bias=False, qkv_bias=False)
FLAVOURS = {
    "timm": {},
    "registers": dict(register_tokens=2, pos_embed="patches", layer_scale=0.1, num_classes=0),
    "distilled": dict(distillation_token=True),
    "map": dict(pool="map", class_token=False, activation="gelu_tanh"),
    "packed": dict(mlp="swiglu_packed", mlp_norm=True, norm_eps=1e-5, **GATED),
    "swiglu": dict(mlp="swiglu", norm="rms", qk_norm=True, **GATED),
    "inner norms": dict(qk_norm=True, attn_norm=True, mlp_norm=True, head_dim=8),
    "clip": dict(pre_norm=True, activation="quick_gelu", patch_norm=True),
    "mean": dict(pool="mean", dynamic_image_size=True, pool_prefix=True),
    "padded": dict(pool="none", pos_embed="none", final_norm=False, dynamic_image_size=True, dynamic_pad=True),
    "vit_pytorch": dict(input_norm=True, norm_eps=1e-5, norm_after_pool=False),
    "vit_pytorch mean": dict(input_norm=True, class_token=False, pool="mean", out_proj=False, head_dim=16),
}


def model_of(flavour, **fields):
    torch.manual_seed(0)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**SIZES | RATES | FLAVOURS[flavour] | fields)).double()
    for weight in model.parameters():  # so that no eps, and no part that starts as a zero, is without effect
        nn.init.normal_(weight, mean=0.05, std=0.2)
    return model


def outputs(model):
    """In evaluation, and with the same draws in training."""
    images = torch.randn(4, model.in_chans, 16, 16, dtype=torch.double, generator=torch.Generator().manual_seed(1))
    found = [model.eval()(images)]
    torch.manual_seed(2)
    return [*found, model.train()(images)]


def back(model, path, **options):
    """The model that the file describes, or the message with which saving it was refused, and then no file."""
    try:
        vitfast.save_checkpoint(model, path, **options)
    except (NotImplementedError, ValueError) as error:
        assert not os.listdir(path.parent)
        return str(error)
    config, state = vitfast.read_config(path), vitfast.read_checkpoint(path)
    path.unlink()
    again = vitfast.ViT.from_config(config)
    again.load_state_dict(state, assign=True)
    return again


def check(model, path, must_be_written=False):
    """The message, None where the file gave a model that computes the same."""
    again = back(model, path)
    if isinstance(again, str):
        assert not must_be_written, again
        return again
    assert {weight.dtype for weight in again.state_dict().values()} == {torch.double}
    try:
        expected = outputs(model)
    except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
        return None  # nothing that could be computed otherwise
    for ours, theirs in zip(outputs(again), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)
    return None


def unlike(one, other):
    return any(a.shape != b.shape or (a - b).abs().max() > 1e-9 for a, b in zip(one, other, strict=True))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


def parts_of_all():
    """Every part of every flavour; what an earlier flavour has as well, not again. Of the blocks the middle one."""
    seen = set()
    for flavour in FLAVOURS:
        for name, module in model_of(flavour).named_modules():
            if re.match(r"blocks\.[02]\.", name) or (name, type(module)) in seen:
                continue
            seen.add((name, type(module)))
            yield flavour, name


PARTS = list(parts_of_all())


def put(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


class Other(nn.Module):
    """A part with an adapter."""

    def __init__(self, base):
        super().__init__()
        self.base, self.gain = base, nn.Parameter(torch.tensor(1.5, dtype=torch.double))

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs) * self.gain


def hook(model, name):
    model.get_submodule(name).register_forward_hook(lambda module, args, out: out * 1.5)


def pre_hook(model, name):
    model.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] * 1.5, *args[1:]))


def patch(model, name):
    module, before = model.get_submodule(name), model.get_submodule(name).forward
    module.forward = lambda *args, **kwargs: before(*args, **kwargs) * 1.5


def subclass(model, name):
    module = model.get_submodule(name)
    kind = type(module)
    before = kind.forward
    module.__class__ = type("Mine", (kind,), {"forward": lambda self, *args, **kwargs: before(self, *args) * 1.5})


def wrap(model, name):
    put(model, name, Other(model.get_submodule(name)))


def identity(model, name):
    put(model, name, nn.Identity())


def remove(model, name):
    put(model, name, None)


def activation(model, name):
    put(model, name, nn.Tanh())


def add_module(model, name):
    model.get_submodule(name).extra = nn.Linear(32, 32).double()


def add_buffer(model, name):
    model.get_submodule(name).register_buffer("extra", torch.ones(3))


def patch_method(model, name):
    module, skipped = model.get_submodule(name), ("forward", "state_dict", "load_state_dict")
    for method in vars(type(module)):
        if callable(getattr(module, method)) and not method.startswith("__") and method not in skipped:
            setattr(module, method, lambda *args, **kwargs: None)


CHANGES = (
    hook, pre_hook, patch, subclass, wrap, identity, remove, activation, add_module, add_buffer, patch_method,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_one_changed_part_is_neither_in_the_file_nor_named(change, path):
    """A hook, an adapter, another module: loads, computes something else."""
    written = 0
    for flavour, name in PARTS:
        if not name and change in (wrap, identity, remove, activation):
            continue
        model = model_of(flavour)
        change(model, name)
        message = check(model, path)
        assert message is None or (name or "ViT") in message or name.rpartition(".")[2] in message, (name, message)
        written += message is None
    assert written < len(PARTS) / 2 if change in (identity, remove, patch_method) else not written


def other_values(value):
    if isinstance(value, bool) or value is None:
        return [not value]
    if isinstance(value, (int, float)):
        return [value * 2 if isinstance(value, int) else value * 0.5 + 0.125]
    if isinstance(value, tuple):
        return [tuple(2 * n for n in value)]
    known = ("none", "tanh", "mlp", "swiglu", "swiglu_packed", "act", "fc1", "cls", "mean", "zeros", "circular")
    return [other for other in known if other != value]


def test_one_changed_attribute_is_neither_in_the_file_nor_named(path):
    """eps, heads, scale, rates, stride, approximate: what no weight tells."""
    skipped = {"training", "config", "feature_info"}
    for flavour, name in PARTS:
        for attribute, value in vars(model_of(flavour).get_submodule(name)).items():
            if attribute in skipped or attribute.startswith("_"):
                continue
            for other in other_values(value):
                model = model_of(flavour)
                vars(model.get_submodule(name))[attribute] = other
                message = check(model, path)
                assert message is None or (name or attribute) in message, (name, attribute, message)


@pytest.mark.parametrize("change", ["none", "wider", "pruned", "normed", "shared", "kept", "unsaved"])
def test_one_changed_parameter_is_neither_in_the_file_nor_named(change, path):
    """Removed, of another shape, pruned, parametrized, used in two places, a buffer that is saved or not."""
    for flavour, parent in PARTS:
        for last, weight in model_of(flavour).get_submodule(parent).named_parameters(recurse=False):
            model = model_of(flavour)
            module = model.get_submodule(parent)
            if change == "none":
                setattr(module, last, None)
            elif change == "wider" and weight.numel():
                setattr(module, last, nn.Parameter(torch.cat([weight, weight])))
            elif change == "pruned" and weight.numel():
                prune.random_unstructured(module, last, 0.5)
            elif change == "normed" and weight.dim() > 1 and weight.numel():
                parametrizations.weight_norm(module, last)
            elif change == "shared" and "blocks.1" in parent:
                setattr(model.get_submodule(parent.replace("blocks.1", "blocks.2")), last, getattr(module, last))
            elif change in ("kept", "unsaved"):
                delattr(module, last)
                module.register_buffer(last, weight.detach().clone(), persistent=change == "kept")
            else:
                continue
            message = check(model, path)
            assert change == "none" or (message is None) is (change == "kept"), (parent, last, change, message)
            assert message is None or (parent or last) in message, (parent, last, change, message)


def everywhere(kind, change):
    def on(model):
        for module in model.modules():
            if type(module) in kind:
                change(module)

    return on


def exchange(pattern, build):
    """Put a new module at every place whose name the pattern matches."""

    def on(model):
        for name, module in list(model.named_modules()):
            if re.fullmatch(pattern, name):
                put(model, name, build(module).double())

    return on


def new_heads(attn):
    attn.num_heads, attn.head_dim, attn.scale = attn.num_heads * 2, attn.head_dim // 2, (attn.head_dim // 2) ** -0.5


def norm(module):
    return nn.LayerNorm(32, eps=1e-6)


def shorten(*blocks):
    return lambda model: setattr(model, "blocks", nn.Sequential(*(model.blocks[i] for i in blocks)))


def move_norm(model):
    model.fc_norm, model.norm = model.norm, model.fc_norm


def rates(model):
    for i, module in enumerate(module for module in model.modules() if type(module) is DropPath):
        module.drop_prob = 0.1 * (i // 2)


def shared_parts(model):
    """Without weights, so nothing is shared."""
    act = nn.GELU()
    exchange(r".*\.act", lambda m: act)(model)


NORMS = (nn.LayerNorm, nn.RMSNorm)
UNCHANGED = ("mode", "note", "shared parts", "eps of the dtype")
# what a ViTConfig can say: (flavour, what somebody does)
WRITTEN = {
    "eps": ("timm", everywhere(NORMS, lambda m: setattr(m, "eps", 0.3))),
    "eps of vit-pytorch": ("vit_pytorch", everywhere(NORMS, lambda m: setattr(m, "eps", 0.3))),
    "eps of the dtype": ("swiglu", everywhere(NORMS, lambda m: setattr(m, "eps", None))),
    "approximate": ("timm", everywhere((nn.GELU,), lambda m: setattr(m, "approximate", "tanh"))),
    "quick": ("timm", exchange(r".*\.act", lambda m: QuickGELU())),
    "gelu": ("clip", exchange(r".*\.act", lambda m: nn.GELU())),
    "silu in the pool too": ("map", exchange(r".*\.act", lambda m: nn.SiLU())),
    "gelu in the gate": ("packed", exchange(r".*\.act", lambda m: nn.GELU())),
    "heads": ("timm", everywhere((Attention,), new_heads)),
    "heads of vit-pytorch": ("vit_pytorch mean", everywhere((Attention,), new_heads)),
    "no head": ("timm", exchange("head", lambda m: nn.Identity())),
    "no head of vit-pytorch": ("vit_pytorch", lambda m: setattr(m, "mlp_head", nn.Identity())),
    "tokens of vit-pytorch": ("vit_pytorch", lambda m: setattr(m, "mlp_head", None)),
    "no heads": ("distilled", exchange("head.*(?<!drop)", lambda m: nn.Identity())),
    "wider head": ("timm", exchange("head", lambda m: nn.Linear(32, 9))),
    "wider heads": ("distilled", lambda m: m.reset_classifier(9)),
    "a head": ("registers", exchange("head", lambda m: nn.Linear(32, 9))),
    "mean": ("timm", lambda m: m.reset_classifier(3, "avg")),
    "no pool any more": ("map", lambda m: m.reset_classifier(3, "avg")),
    "mean of vit-pytorch": ("vit_pytorch", lambda m: setattr(m, "pool", "mean")),
    "shorter": ("timm", shorten(0, 1)),
    "every second block": ("timm", shorten(0, 2)),
    "one block": ("timm", shorten(0)),
    "no block": ("timm", shorten()),
    "another order": ("registers", lambda m: (shorten(2, 1, 0)(m), rates(m))),
    "longer": ("timm", lambda m: (m.blocks.append(copy.deepcopy(m.blocks[1])), rates(m))),
    "depth of vit-pytorch": ("vit_pytorch", shorten(0, 1)),
    "4 channels": ("timm", exchange(r"patch_embed\.proj", lambda m: nn.Conv2d(4, 32, 8, 8))),
    "13 channels": ("mean", exchange(r"patch_embed\.proj", lambda m: nn.Conv2d(13, 32, 8, 8))),
    "layer scale": ("timm", exchange(r".*\.ls\d", lambda m: LayerScale(32, 0.3))),
    "layer scale from 0": ("vit_pytorch", exchange(r".*\.ls\d", lambda m: LayerScale(32, 0.0))),
    "no layer scale": ("registers", exchange(r".*\.ls\d", lambda m: nn.Identity())),
    "layer scales": ("registers", lambda m: setattr(m.blocks[1], "ls1", LayerScale(32, 0.7).double())),
    "no final norm": ("timm", exchange("norm", lambda m: nn.Identity())),
    "no final norm of vit-pytorch": ("vit_pytorch", exchange("norm", lambda m: nn.Identity())),
    "norm before pooling": ("mean", move_norm),
    "norm after pooling": ("vit_pytorch mean", move_norm),
    "final norm": ("padded", exchange("norm", norm)),
    "patch norm": ("timm", exchange(r"patch_embed\.norm", norm)),
    "no patch norm": ("clip", exchange(r"patch_embed\.norm", lambda m: nn.Identity())),
    "no q and k norm": ("inner norms", exchange(r".*\.[qk]_norm", lambda m: nn.Identity())),
    "q and k norm": ("timm", exchange(r".*\.[qk]_norm", lambda m: nn.LayerNorm(16, eps=1e-6))),
    "no inner norms": ("inner norms", exchange(r".*\.(attn|mlp)\.norm", lambda m: nn.Identity())),
    "inner norm": ("timm", exchange(r".*\.attn\.norm", norm)),
    "rms": ("inner norms", lambda m: [
        put(m, name, nn.RMSNorm(each.normalized_shape, eps=1e-4).double())
        for name, each in list(m.named_modules()) if type(each) is nn.LayerNorm
    ]),
    "other mlp": ("timm", lambda m: [exchange(pattern, build)(m) for pattern, build in (
        (r"blocks.*\.fc1", lambda m: nn.Linear(32, 20)), (r"blocks.*\.fc2", lambda m: nn.Linear(20, 32)),
    )]),
    "no bias": ("timm", everywhere((Attention,), lambda m: setattr(m.qkv, "bias", None))),
    "dropout": ("timm", everywhere((nn.Dropout,), lambda m: setattr(m, "p", 0.45))),
    "no dropout": ("map", everywhere((nn.Dropout,), lambda m: setattr(m, "p", 0.0))),
    "dropout removed": ("vit_pytorch", exchange(r".*drop\d?", lambda m: nn.Identity())),
    "drop path removed": ("timm", exchange(r".*drop_path\d", lambda m: nn.Identity())),
    "drop path": ("timm", rates),
    "mode": ("registers", lambda m: (m.set_grad_checkpointing(), m.set_mlp_recompute("fc1"), m.requires_grad_(False))),
    "note": ("timm", lambda m: setattr(m, "note", "mine")),
    "shared parts": ("timm", shared_parts),
}  # fmt: skip


@pytest.mark.parametrize(("flavour", "change"), WRITTEN.values(), ids=WRITTEN.keys())
def test_uniform_change_is_lost_or_refused(flavour, change, path):
    """A file that gives the model as it was built."""
    model = model_of(flavour)
    before = outputs(model)
    change(model)
    check(model, path, must_be_written=True)
    # what is the same before and after shows nothing
    assert unlike(before, outputs(model)) or change in [WRITTEN[name][1] for name in UNCHANGED]


def test_image_size_is_lost(path):
    model = model_of("timm")
    model.set_input_size((16, 24))
    again = back(model, path)
    assert again.patch_embed.img_size == (16, 24) and again.config == model.config


def test_pooling_by_vit_pytorchs_name_is_lost(path):
    """A classifier that is replaced afterwards has to read what it read before."""
    model = model_of("vit_pytorch")
    model.pool = "mean"
    again = back(model, path)
    for each in (model, again):
        torch.manual_seed(3)
        each.mlp_head = nn.Linear(32, 7).double()
    assert again.pool == "mean" and not unlike(outputs(again), outputs(model))


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_dtypes_are_lost(dtypes, path):
    """Of the weights in the file; a model that they are copied into keeps its own."""
    model = model_of("timm").to(dtypes[0])
    for module in model.modules():
        if type(module) is nn.LayerNorm:
            module.to(dtypes[1])
    again = back(model, path)
    for (name, one), other in zip(model.named_parameters(), again.parameters(), strict=True):
        assert one.dtype is other.dtype and torch.equal(one, other), name


@pytest.mark.parametrize("flavour", ["timm", "vit_pytorch"])
@pytest.mark.parametrize("layout", ["timm", "vit_pytorch"])
def test_compiled_parts_are_refused(flavour, layout, path):
    """torch.compile of single blocks, and of the whole: neither changes what the model computes."""
    if flavour == "timm" and layout != "timm":
        return
    model = model_of(flavour)
    expected = outputs(model)
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    model.blocks[2].compile(backend="eager")
    if layout == "timm":
        model.blocks = torch.compile(model.blocks, backend="eager")
    again = back(torch.compile(model, backend="eager"), path, layout=layout)
    assert not unlike(outputs(again), expected)


class WithLoss(vitfast.ViT):
    def loss(self, images, labels):
        return nn.functional.cross_entropy(self(images), labels)


class Doubled(vitfast.ViT):
    def forward_features(self, x, attn_mask=None):
        return 2 * super().forward_features(x, attn_mask)


def test_subclass_that_computes_something_else_is_written(path):
    """`ViT.from_config` would give the model without the override."""
    config = model_of("timm").config
    assert not isinstance(back(WithLoss.from_config(config), path), str)
    assert "Doubled.forward_features" in back(Doubled.from_config(config), path)
    with pytest.raises(TypeError, match="must be a vitfast.ViT, got Sequential"):
        vitfast.save_checkpoint(nn.Sequential(model_of("timm")), path)


def test_refused_model_destroys_the_old_file_or_cannot_be_saved_at_all(path):
    model = model_of("timm")
    vitfast.save_checkpoint(model, path)
    old = path.read_bytes()
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: None)
    with pytest.raises(NotImplementedError, match=r"blocks\.1 has forward hooks.*with_config=False"):
        vitfast.save_checkpoint(model, path)
    assert path.read_bytes() == old and os.listdir(path.parent) == [path.name]
    vitfast.save_checkpoint(model, path, with_config=False)
    assert vitfast.read_config(path) is None
    handle.remove()
    again = vitfast.load_checkpoint(model_of("timm"), path)
    assert not unlike(outputs(again), outputs(model))


def test_saving_draws_random_numbers():
    """A run would go on with others than one that does not save."""
    model = model_of("timm")
    state = torch.get_rng_state()
    config_of(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("change", ["layer scale from 0", "no final norm of vit-pytorch"])
def test_weights_without_a_name_in_vit_pytorch_are_written_under_its_names(change, path):
    model = model_of("vit_pytorch")
    WRITTEN[change][1](model)
    message = back(model, path, layout="vit_pytorch")
    assert re.search(r"layout='vit_pytorch'.*(blocks\.0\.ls1\.gamma|no final norm)", message)


def test_config_is_read_where_the_model_is_another_by_now():
    """Channels of a new stem, and the grid that the positions have."""
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    model.patch_embed.proj = nn.Conv2d(4, 192, 16, 16)
    assert model.in_chans == 4
    # three means of ImageNet's do not fit four channels
    assert vitfast.prepare(model.eval()).normalisation is None
    model.patch_embed.img_size, model.patch_embed.grid_size = (16, 64), (1, 4)
    expected = resample_pos_embed(model.pos_embed.detach(), (2, 3), (1, 4), 1)
    model.set_input_size((32, 48))
    assert torch.equal(model.pos_embed, expected)
