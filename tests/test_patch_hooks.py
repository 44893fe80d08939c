"""Hooks of torch and of accelerate on modules of a patched model: each runs once, and sees what it saw before."""

import accelerate
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from patch_pair import equal, near, ops_in, own_forward, patched_copy, results_of, same, small, state_of
from timm_pair import run
from torch.nn.modules import module as torch_module

import vitfast

BLOCK = "blocks.1"


# hooks that change what goes through them, so that one that is passed over is seen: it counts its calls
def scaled(values, by):
    return tuple(by * t if isinstance(t, torch.Tensor) else t for t in values)


def hook_of(kind, count):
    def forward(module, args, out):
        count.append(1)
        return 1.25 * out

    def forward_kwargs(module, args, kwargs, out):
        count.append(1)
        return 1.25 * out

    def pre(module, args):
        count.append(1)
        return scaled(args, 1.25)

    def pre_kwargs(module, args, kwargs):
        count.append(1)
        return scaled(args, 1.25), kwargs

    def backward(module, grad_in, grad_out):
        count.append(1)
        return scaled(grad_in, 1.25)

    def backward_pre(module, grad_out):
        count.append(1)
        return scaled(grad_out, 1.25)

    return locals()[kind]


HOOKS = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward_kwargs": lambda m, hook: m.register_forward_hook(hook, with_kwargs=True, always_call=True),
    "pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "pre_kwargs": lambda m, hook: m.register_forward_pre_hook(hook, with_kwargs=True),
    "backward": lambda m, hook: m.register_full_backward_hook(hook),
    "backward_pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
}
GLOBAL_HOOKS = {
    "forward": torch_module.register_module_forward_hook, "pre": torch_module.register_module_forward_pre_hook,
    "backward": torch_module.register_module_full_backward_hook,
    "backward_pre": torch_module.register_module_full_backward_pre_hook,
}  # fmt: skip


@pytest.mark.parametrize("kind", HOOKS)
def test_hook_is_passed_over_or_runs_twice(kind):
    """On the block and on each module inside, one after the other: added after the patch."""
    model, images = small(train=True, batch=2, qk_norm=True)
    patched = patched_copy(model)
    plain = results_of(model, images)
    names = [name for name, _ in model.named_modules() if name == BLOCK or name.startswith(f"{BLOCK}.")]
    assert len(names) > 18
    for name in names:
        counts, results = [], []
        for each in (model, patched):
            counts.append([])
            with torch.no_grad():
                each(images)
            handle = HOOKS[kind](each.get_submodule(name), hook_of(kind, counts[-1]))
            results.append(results_of(each, images))
            handle.remove()
        assert counts[0] == counts[1] and len(counts[0]) <= 1, name
        same(results[1], results[0])
    same(results_of(patched, images), plain)
    assert "mlp" in ops_in(patched, images)


@pytest.mark.parametrize("kind", GLOBAL_HOOKS)
def test_global_hook_is_passed_over(kind):
    """Profilers, FLOP counters and debuggers see all modules, and the report says why nothing is fused."""
    model, images = small(train=True)
    patched, counts, results = patched_copy(model), [], []
    for each in (model, patched):
        counts.append([])
        handle = GLOBAL_HOOKS[kind](hook_of(kind, counts[-1]))
        try:
            results.append(results_of(each, images))
            said = str(vitfast.patch(patched))
        finally:
            handle.remove()
    assert len(counts[0]) == len(counts[1]) > 40
    equal(results[1], results[0])
    assert "a global module hook is registered" in said and "op mlp" not in said


def test_forward_of_a_block_is_overwritten_or_passed_over():
    """One that is there before: left and named, with all bits; one on top of ours: run, also when ours is taken off."""
    model, images = small(train=True)
    plain = run(model, images)
    own_forward(model.blocks[0])
    expected = run(model, images)
    before = state_of(model)
    report = vitfast.patch(model)
    assert [(part.name, part.reason) for part in report.left] == [("blocks.0", "has a patched forward")]
    assert {part.name.split(".")[1] for part in report.fused if "blocks" in part.name} == {"1"}
    assert "has a patched forward" in str(vitfast.explain(model))
    near(run(model, images)[0], expected[0], 1e-4)
    vitfast.unpatch(model)
    equal(state_of(model), before)
    equal(run(model, images), expected)
    del model.blocks[0].forward
    vitfast.patch(model)
    mine = own_forward(model.blocks[0])
    near(run(model, images)[0], expected[0], 1e-4)
    with vitfast.patched(model, mlp=False):
        near(run(model, images)[0], expected[0], 1e-4)
    near(run(model, images)[0], expected[0], 1e-4)
    assert "mlp" in ops_in(model.blocks[0], torch.randn(1, 5, 64))
    vitfast.unpatch(model)
    equal(run(model, images), expected)
    mine()
    vitfast.unpatch(model)
    equal(run(model, images), plain)


def test_accelerate_is_lost():
    """Its wrapper around a patched block: before, during and after `patched`, and when either is taken off first."""

    class Counted(ModelHook):
        def pre_forward(self, module, *args, **how):
            calls.append(1)
            return args, how

    calls = []
    model, images = small()
    expected = model(images)
    vitfast.patch(model)
    block = add_hook_to_module(model.blocks[0], Counted())
    near(model(images), expected)
    with vitfast.patched(model, attention=False):
        near(model(images), expected)
    near(model(images), expected)
    assert len(calls) == 3 and "attention_qkv" in ops_in(block, torch.randn(1, 5, 64))
    vitfast.unpatch(model)
    equal(model(images), expected)
    assert len(calls) == 5
    remove_hook_from_module(block)
    equal(model(images), expected)
    assert len(calls) == 5
    # a bound method that accelerate puts back is no patch of anybody
    vitfast.unpatch(model)
    add_hook_to_module(block, Counted())
    assert [part.name for part in vitfast.patch(model).left] == ["blocks.0"]
    remove_hook_from_module(block)
    assert not vitfast.patch(model).require("attention", "norm", "mlp").left
    near(model(images), expected)
    vitfast.unpatch(model)
    equal(model(images), expected)


@pytest.mark.parametrize("whole", [True, False], ids=["block", "each module"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_weights_are_read_on_meta(whole, when):
    """accelerate's `cpu_offload`: weights are on meta but while a module, or a block, is run."""
    model, images = small()
    with torch.no_grad():
        expected = model(images)
    if when == "after":
        vitfast.patch(model)
    accelerate.cpu_offload(model.blocks, execution_device="cpu", preload_module_classes=["Block"] if whole else None)
    report = vitfast.patch(model)
    assert model.blocks[0].mlp.fc1.weight.is_meta
    with torch.no_grad():
        near(model(images), expected)
        vitfast.unpatch(model)
        equal(model(images), expected)
    if not whole:
        assert "mlp.fc1 has a patched forward" in str(report.left)
