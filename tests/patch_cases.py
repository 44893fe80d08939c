"""Models of any library with weights like trained ones, patched and not, and what is asked of them all."""

import copy
import warnings

import patch_pair
import torch
from patch_pair import equal, near, state_of
from test_ops import Recorder
from test_parity_timm import relative
from timm_pair import MASSIVE, run
from torch import nn

import vitfast

KINDS = ("attention", "norm", "mlp")


@torch.no_grad()
def make_trained_like(model, images, mlps=()):
    """`timm_pair.make_trained_like` for modules of any name. mlps: (fc1, fc2) that write massive activations."""
    for name, p in model.named_parameters():
        owner, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if "bias" in kind:
            p.normal_(std=0.3)
        elif isinstance(owner, (nn.Linear, nn.Conv2d, nn.MultiheadAttention)):
            p.normal_(std=0.7 * p[0].numel() ** -0.5)
        elif isinstance(owner, (nn.LayerNorm, nn.RMSNorm)):
            p.normal_(std=0.4).exp_()
            p[:: max(p.numel() // 4, 1)] = 10
            p[MASSIVE] = 0.1 if mlps else p[MASSIVE]
        else:
            p.normal_(std=0.5)
    hooks = [
        linear.register_forward_pre_hook(write)
        for pair in mlps
        for linear, write in zip(pair, (_open, _write), strict=True)
    ]
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.copy_(p.bfloat16())
    return model.train()


def _open(fc1, args):
    """Let one hidden unit be open for the three tokens that fit it best."""
    best = (args[0] @ fc1.weight[0]).flatten().topk(4).values
    fc1.weight[0] *= 4 / (best[0] - best[3])
    fc1.bias[0] = -4 * best[3] / (best[0] - best[3])


def _write(fc2, args):
    """Write 1e3 into one channel where that unit is open."""
    fc2.weight[MASSIVE] = 0
    fc2.weight[MASSIVE, 0] = 1e3 / (args[0][..., 0].amax() - args[0][..., 0].amin())


def patched_copy(model):
    """A copy that was patched, and what the report says."""
    patched = copy.deepcopy(model)
    return patched, vitfast.patch(patched)


def ops_in(function, *args):
    with Recorder() as recorder:
        function(*args)
    return {str(func).split(".")[1] for func, *_ in recorder.calls}


class Case(patch_pair.Case):
    """A model, its patched copy, and what the model computes in fp64."""

    def __init__(self, model, images):
        self.stock, self.images = model, images
        self.patched, report = patched_copy(model)
        report.require(*KINDS)
        self.ref = copy.deepcopy(model).double()
        with torch.no_grad():
            self.cotangent = torch.randn_like(model(images)).bfloat16()
        self.out, self.grads = run(self.ref, images.double(), self.cotangent)

    def is_the_same_formula(self):
        out, grads = run(self.patched.double(), self.images.double(), self.cotangent)
        assert relative(out, self.out) < 1e-12
        equal_gradients(grads, self.grads, 1e-9)


def equal_gradients(found, expected, tolerance):
    assert list(found) == list(expected)
    for at, ref in expected.items():
        assert (found[at] is None) == (ref is None), at
        # a bias of keys adds the same to all scores of a query: its third of the gradient is rounding alone
        if ref is not None and ref.norm() > 0:
            assert relative(found[at].double(), ref.double()) < tolerance, at


def same_result(model, images, change=lambda model: None, mode=True):
    """Stock and patched after the same change, made after a call: (model, patched), both changed."""
    patched, _ = patched_copy(model.train(mode))
    # so that what was decided of blocks is kept
    patched(images)
    for each in (model, patched):
        torch.manual_seed(2)
        with torch.no_grad():
            change(each)
    (out, grads), (expected, expected_grads) = run(patched, images), run(model, images)
    near(out, expected)
    equal_gradients(grads, expected_grads, 1e-3)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = model(images)
        torch.manual_seed(1)
        near(patched(images), expected)
    return model, patched


def is_undone(model, images):
    """Patched and back: each bit, each attribute."""
    before, results = state_of(model), run(model, images)
    vitfast.patch(model)
    equal(model.state_dict(), before[0])
    assert [name for name, *_ in state_of(model)[1]] == [name for name, *_ in before[1]]
    assert ops_in(model, images)
    vitfast.unpatch(model)
    equal(state_of(model), before)
    equal(run(model, images), results)
    assert not ops_in(model, images)


def hooks_run_once(model, images, holder):
    """Hooks on each module inside `holder(model)`, one at a time: {name: kinds that the report leaves for it}."""
    patched, report = patched_copy(model)
    patched(images)
    assert not [part for part in report.left if part.kind != "patch_embed"]
    left = {}
    for name, _ in holder(model).named_modules():
        seen, handles = ([], []), []
        for each, found in zip((model, patched), seen, strict=True):
            inner = holder(each).get_submodule(name)
            before = lambda _, args, found=found: found.append(len(args))  # noqa: E731
            after = lambda _, args, out, found=found: found.append(out)  # noqa: E731
            handles += [inner.register_forward_pre_hook(before), inner.register_forward_hook(after)]
            each(images)
        for found, expected in zip(*reversed(seen), strict=True):
            if isinstance(expected, torch.Tensor):
                near(found, expected)
        report = vitfast.patch(patched)
        left[name] = {part.kind for part in report.left if "hooks" in part.reason}
        assert report.fused, name
        for handle in handles:
            handle.remove()
    assert ops_in(patched, images)
    return left


def drifts(model, images, lr=0.01):
    """How far three steps of SGD are from those of the unpatched model, the worst of the tensors."""
    start, weights = copy.deepcopy(model.state_dict()), []
    for patched in (False, True):
        model.load_state_dict(start)
        if patched:
            vitfast.patch(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        torch.manual_seed(1)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        weights.append(copy.deepcopy(model.state_dict()))
    moved = {at: (ref - start[at]).norm() for at, ref in weights[0].items()}
    assert any(norm > 1e-3 for norm in moved.values())
    return max(
        ((weights[1][at] - ref).norm() / (moved[at] + 1e-3 * ref.norm())).item() for at, ref in weights[0].items()
    )


def draws_of(module, x, times=64):
    """Mean and standard deviation of what a module gives in training, over many draws: x [N, D] as a batch."""
    torch.manual_seed(3)
    with torch.no_grad():
        outs = torch.cat([module(x.expand(64, *x.shape)) for _ in range(times // 4)])
    return outs.mean(0), outs.std(0)


def quietly(function, *args, **keywords):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **keywords)
