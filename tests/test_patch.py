"""`vitfast.patch` itself: its arguments, what it may be done to, what survives it, and the way back."""

import copy
import gc
import io
import pickle
import subprocess
import sys
import threading
import weakref

import pytest
import torch
from patch_pair import build, equal, near, ops_in, ops_of, patched_copy, small, state_of
from timm.models.vision_transformer import Block, VisionTransformer
from timm_pair import run
from torch import nn

import vitfast
from vitfast.patching.known import KNOWN
from vitfast.patching.patch import BESIDE

KINDS = ("attention", "norm", "mlp")
ALL_OPS = {"linear", "attention_qkv", "mlp"}


@pytest.mark.parametrize("function", [vitfast.patch, vitfast.unpatch, lambda m: vitfast.patched(m).__enter__()])
@pytest.mark.parametrize(
    ("given", "got"),
    [("vit_base", "str 'vit_base'"), (VisionTransformer, "the class VisionTransformer"), (None, "NoneType None")],
)
def test_argument_is_no_module(function, given, got):
    with pytest.raises(TypeError, match=f"model must be a module .*, got {got}"):
        function(given)


def test_data_parallel_runs_the_weights_of_another_copy():
    """Refused by name where it is there, and where it comes later and copies. So is torch.jit.script."""
    model, images = small()
    with pytest.raises(NotImplementedError, match="patch: nn.DataParallel .*DistributedDataParallel"):
        vitfast.patch(nn.Sequential(nn.DataParallel(model)))
    assert not any(name in module.__dict__ for module in model.modules() for name in ("forward", *BESIDE))
    vitfast.patch(model)
    with pytest.raises(NotImplementedError, match=r"DataParallel cannot copy a Block .*vitfast\.unpatch\(model\)"):
        model.blocks[0]._replicate_for_data_parallel()
    with pytest.raises(NotImplementedError, match=r"torch.jit.script cannot compile a .*vitfast\.unpatch\(model\)"):
        torch.jit.script(model)
    vitfast.unpatch(model)
    assert type(model.blocks[0]._replicate_for_data_parallel()) is Block


# what is asked for: the ops that run
FLAGS = {
    (): ALL_OPS,
    ("attention",): {"layer_norm", "mlp"},
    ("norm",): {"linear", "attention_qkv"},
    ("mlp",): {"linear", "attention_qkv", "layer_norm"},
    ("patch_embed",): ALL_OPS,
    ("attention", "mlp"): {"layer_norm"},
    ("attention", "norm"): {"linear"},
    ("norm", "mlp"): {"linear", "attention_qkv"},
    ("attention", "norm", "mlp"): set(),
    ("attention", "norm", "mlp", "patch_embed"): set(),
}


@pytest.mark.parametrize("off", FLAGS, ids=lambda off: " ".join(off) or "none")
def test_part_that_is_off_runs_or_another_is_off_too(off):
    model, images = small()
    expected = model(images)
    report = vitfast.patch(model, **dict.fromkeys(off, False))
    near(model(images), expected)
    blocks = nn.Sequential(*model.blocks)
    assert ops_in(blocks, torch.randn(2, 5, 64)) == FLAGS[off]
    with torch.no_grad():
        assert ("patch_embed" in ops_of(lambda: model(images))[1]) == ("patch_embed" not in off)
    for kind in (*KINDS, "patch_embed"):
        if kind in off:
            with pytest.raises(RuntimeError, match=f"nothing of kind '{kind}' is fused: .*{kind}=False was asked for"):
                report.require(kind)
        else:
            report.require(kind)


def test_second_patch_adds_to_the_first():
    """Flags of the first call that stay, forwards of forwards, and an unpatch that takes one of two back."""
    model, images = small()
    before, expected = state_of(model), model(images)
    vitfast.patch(model)
    first = {name: dict(module.__dict__) for name, module in model.named_modules()}
    vitfast.patch(model)
    for name, module in model.named_modules():
        assert list(module.__dict__) == list(first[name])
        assert module.__dict__.get("forward") is first[name].get("forward")
    vitfast.patch(model, attention=False)
    assert ops_in(model, images) == FLAGS[("attention",)]
    vitfast.patch(model)
    assert ops_in(model, images) == ALL_OPS
    vitfast.unpatch(model)
    equal(state_of(model), before)
    equal(model(images), expected)
    vitfast.unpatch(model)
    equal(state_of(model), before)


class Stop(Exception):
    pass


def test_context_leaves_another_model_behind():
    model, images = small()
    before, expected = state_of(model), model(images)
    with pytest.raises(Stop), vitfast.patched(model) as report:
        report.require(*KINDS)
        with vitfast.patched(model, mlp=False):
            assert ops_in(model, images) == FLAGS[("mlp",)]
            with pytest.raises(Stop), vitfast.patched(model, attention=False):
                raise Stop
            assert ops_in(model, images) == FLAGS[("mlp",)]
        assert ops_in(model, images) == ALL_OPS
        raise Stop
    equal(state_of(model), before)
    equal(model(images), expected)
    vitfast.patch(model, norm=False)
    with vitfast.patched(model):
        vitfast.unpatch(model)
    assert ops_in(model, images) == FLAGS[("norm",)]
    with pytest.raises(TypeError), vitfast.patched(model, heads=True):
        pass
    assert ops_in(model, images) == FLAGS[("norm",)]


def through_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": through_file}


@pytest.mark.parametrize("way", COPIES)
def test_copy_is_not_patched_or_runs_the_original(way):
    model, images = small(train=True)
    vitfast.patch(model, attention=False)
    copied = COPIES[way](COPIES[way](model))
    vitfast.patch(model).require("attention")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    expected = small_again(copied)
    assert ops_in(copied, images) == FLAGS[("attention",)]
    (out, grads), (ref, ref_grads) = run(copied, images), run(expected, images)
    near(out, ref)
    for name, grad in ref_grads.items():
        near(grads[name], grad, 1e-4)
    assert not run(model, images)[0].any()
    vitfast.unpatch(copied)
    equal(run(copied, images), (ref, ref_grads))


def small_again(model):
    """The model as it is without a patch, built anew."""
    built, _ = small(train=model.training)
    built.load_state_dict(model.state_dict())
    return built


READ = """
import sys
import torch
if "other" in sys.argv:
    from timm.models.vision_transformer import Block
    stock = Block.forward
    Block.forward = lambda self, x, attn_mask=None, is_causal=False: 0 * stock(self, x)
model, images, out = torch.load(sys.argv[1], weights_only=False)
import vitfast
from vitfast.ops import _on_cpu
_on_cpu.HOST_BOUND, _on_cpu.LIMITS = 0, dict.fromkeys(_on_cpu.LIMITS, 0)
from torch.utils._python_dispatch import TorchDispatchMode
class Names(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.add(str(func))
        return func(*args, **(kwargs or {}))
names = set()
with torch.no_grad(), Names():
    found = model(images)
print("vitfast.mlp.default" in names)
print(float((found - out).norm() / out.norm()))
print(sorted({part.path for part in vitfast.explain(model).rows}))
print(vitfast.patch(model))
with vitfast.patched(model):
    pass
vitfast.unpatch(model)
assert not any("forward" in module.__dict__ for module in model.modules())
"""


@pytest.mark.parametrize("library", ["same", "other"])
def test_another_process_reads_another_model(library, tmp_path):
    """One that has imported nothing before it unpickles; and one whose timm computes something else in a block."""
    model, images = small()
    vitfast.patch(model)
    with torch.no_grad():
        torch.save((model, images, model(images)), tmp_path / "model.pt")
    command = [sys.executable, "-c", READ, str(tmp_path / "model.pt"), library]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    fused, distance, paths, report = found.stdout.split("\n", 3)
    assert fused == str(library == "same")
    if library == "same":
        assert float(distance) < 1e-5
        assert "own modules" not in paths and "op mlp" in paths
        assert "linear, attention, linear" in report
    else:
        assert float(distance) > 0.1
        assert "op mlp" not in paths and "own forward" in paths
        assert "blocks.* (2)" in report and "whose source is not there to be compared" in report


MOVES = {
    "bf16": lambda model: model.to(torch.bfloat16), "fp16": lambda model: model.half(),
    "fp64": lambda model: model.double(), "channels last": lambda model: model.to(memory_format=torch.channels_last),
    "share_memory": lambda model: model.share_memory(), "float of float": lambda model: model.float(),
}  # fmt: skip


@pytest.mark.parametrize("move", MOVES)
def test_model_that_moves_is_left_behind(move):
    model, images = small(train=True)
    patched = MOVES[move](patched_copy(model))
    model = MOVES[move](model)
    images = images.to(next(model.parameters()).dtype)
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    assert ops_in(patched, images) == ALL_OPS
    rtol = 1e-4 if images.dtype in (torch.float32, torch.float64) else 0.05
    near(out, expected, rtol)
    for name, grad in expected_grads.items():
        near(grads[name], grad, 4 * rtol)


def test_model_on_meta_is_not_patched():
    """Patched before it has weights, and asked for shapes there."""
    model, images = small()
    with torch.device("meta"):
        empty = type(model)(img_size=32, patch_size=16, embed_dim=64, depth=2, num_heads=2, mlp_ratio=3, num_classes=10,
                            init_values=0.5, in_chans=3)  # fmt: skip
    vitfast.patch(empty).require(*KINDS)
    assert empty(images.to("meta")).shape == (3, 10)
    filled = empty.to_empty(device="cpu").eval()
    filled.load_state_dict({name: torch.randn_like(t) for name, t in filled.state_dict().items()})
    assert ops_in(filled, images) == ALL_OPS
    out = filled(images)
    vitfast.unpatch(filled)
    near(out, filled(images))


def test_inference_mode_makes_a_model_that_cannot_train():
    model, images = small(train=True)
    expected = run(model, images)
    with torch.inference_mode():
        vitfast.patch(model).require(*KINDS)
        near(model(images), expected[0])
        assert model(images).is_inference()
    out, grads = run(model, images)
    near(out, expected[0])
    assert all(grad is not None for grad in grads.values())


def test_forward_in_another_thread_sees_half_a_patch():
    model, images = small()
    with torch.no_grad():
        expected = model(images)
    stop, faults = threading.Event(), []

    def forwards():
        with torch.no_grad():
            while not stop.is_set():
                try:
                    near(model(images), expected)
                except Exception as problem:  # noqa: BLE001
                    faults.append(problem)
                    return

    threads = [threading.Thread(target=forwards) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(150):
        vitfast.patch(model, mlp=i % 3 != 0)
        if i % 2:
            vitfast.unpatch(model)
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


def test_vit_of_ours_is_patched():
    ours = vitfast.create_model("test_vit", img_size=32, depth=2, num_classes=10).eval()
    before = state_of(ours)
    report = vitfast.patch(ours)
    equal(state_of(ours), before)
    assert "the model is a vitfast.ViT, which runs ops of its own and needs no patch" in str(report)
    report.require(*KINDS)
    theirs, images = small()
    both = nn.ModuleDict({"ours": ours, "theirs": theirs})
    report = vitfast.patch(both).require(*KINDS)
    assert "ours is a vitfast.ViT" in str(report) and "theirs.blocks.*.attn (2)" in str(report)
    equal(state_of(ours), before)
    parts = [row.part for row in vitfast.explain(both).rows]
    assert "theirs.blocks.0.attn" in parts and "ours.patch_embed" in parts and len(parts) == len(set(parts))
    vitfast.unpatch(both)
    assert "theirs" not in str(vitfast.explain(both).rows)


class Holder(nn.Module):
    """A model with attention in the name of a child, around a whole timm model."""

    def __init__(self, model):
        super().__init__()
        self.attention_model = model

    def forward(self, images):
        return self.attention_model(images)


def test_models_of_other_shapes():
    """A block alone, one that is used twice, a list without forward, nothing at all."""
    model, images = small()
    tokens = torch.randn(2, 5, 64)
    block, other = model.blocks
    twice = nn.Sequential(block, block, nn.Sequential(block))
    expected = block(tokens), twice(tokens)
    assert [part.name for part in vitfast.patch(block).fused] == ["attn", "norm1", "mlp", "norm2"]
    near(block(tokens), expected[0])
    vitfast.unpatch(block)
    assert len(vitfast.patch(twice).require(*KINDS).fused) == 4
    near(twice(tokens), expected[1])
    assert ops_in(twice, tokens) == ALL_OPS
    vitfast.unpatch(twice)
    blocks = nn.ModuleList([block, other])
    other.mlp = block.mlp
    assert len(vitfast.patch(blocks).require(*KINDS).fused) == 8
    vitfast.unpatch(blocks)
    vitfast.patch(Holder(model)).require(*KINDS)
    vitfast.unpatch(model)
    for nothing in (nn.Identity(), nn.Sequential(), nn.ModuleList(), nn.Linear(3, 3)):
        report = vitfast.patch(nothing)
        assert not report.fused and not report.left
        with pytest.raises(RuntimeError, match="'mlp' is fused: the model has no block or layer that vitfast knows"):
            report.require("mlp")
        vitfast.unpatch(nothing)


def test_report_says_what_is_not_so():
    model, images = small()
    with pytest.raises(TypeError, match=r"explain: model must be .*vitfast\.patch was .*, got VisionTransformer"):
        vitfast.explain(model)
    plain = repr(model)
    report = vitfast.patch(model, patch_embed=False)
    with pytest.raises(ValueError, match="kinds must be of .*'mlp'.*, got 'MLP'"):
        report.require("attention", "MLP")
    assert "(0): Block(\n      vitfast.patch: attention norm mlp\n" in repr(model)
    assert report.require("mlp") is report and str(report) == repr(report)
    assert len({len(line.split()) > 2 for line in str(report).splitlines()}) == 1
    # of now, not of the time of the patch
    model.blocks[1].mlp.fc1.register_forward_hook(lambda *given: None)
    rows = {row.part: row for row in vitfast.explain(model).rows}
    assert (
        rows["blocks.1.mlp"].path == "its modules' own forward"
        and "fc1 has forward hooks" in rows["blocks.1.mlp"].reason
    )
    assert rows["blocks.0.mlp"].path == "op mlp" and rows["blocks.1.norm2"].path == "op layer_norm"
    # of a block that came later
    model.blocks.append(small()[0].blocks[0])
    rows = {row.part: row for row in vitfast.explain(model).rows}
    assert "was not there when" in rows["blocks.2"].reason
    vitfast.set_exportable(True)
    try:
        assert {row.path for row in vitfast.explain(model).rows} == {"its modules' own forward"}
        assert not ops_in(model, images)
    finally:
        vitfast.set_exportable(False)
    vitfast.unpatch(model)
    model.blocks.pop(2)
    model.blocks[1].mlp.fc1._forward_hooks.clear()
    assert repr(model) == plain


def test_model_is_kept_alive():
    """By what is noted of it for later; and classes that are made for one module, as parametrizations do, stay."""
    model, images = small(train=True)
    vitfast.patch(model)
    before = len(KNOWN)
    for i in range(3):
        nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
        model.blocks[1].mlp.act = type(f"Act{i}", (nn.GELU,), {})()
        vitfast.patch(nn.Sequential(type(f"Block{i}", (Block,), {})(64, 2), model))
        run(model, images)
        vitfast.explain(model)
        nn.utils.parametrize.remove_parametrizations(model.blocks[0].mlp.fc1, "weight")
    assert len(KNOWN) == before
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_shallow_copy_stays_patched():
    """It has the forward of the original, which `unpatch` has to find as one of ours."""
    model, _ = small()
    vitfast.patch(model)
    copied = copy.copy(model.blocks[0])
    vitfast.patch(copied)
    assert copied.forward.__self__ is copied
    vitfast.unpatch(copied)
    assert not any(name in copied.__dict__ for name in ("forward", *BESIDE)) and "forward" in model.blocks[0].__dict__


def test_norm_inside_attention_or_mlp_is_fused_unasked(monkeypatch):
    """With norm=False each norm is called, those before the last projections too."""
    model, images = build("all norms")
    model.eval()
    expected = model(images)
    vitfast.patch(model, norm=False)
    called = []
    for norm in (m for m in model.blocks.modules() if isinstance(m, nn.LayerNorm)):
        monkeypatch.setattr(type(norm), "__call__", lambda self, x: called.append(self) or self.forward(x))
    found = model(images)
    assert {id(m) for m in called} >= {id(m) for m in model.blocks.modules() if isinstance(m, nn.LayerNorm)}
    near(found, expected, 1e-4)
