"""Models of torchvision and vit-pytorch with weights like trained ones, small, and the same models patched."""

import copy

import torch
from patch_pair import patched_copy as patched_copy
from test_ops import Recorder
from test_parity_timm import RATIO, gradients_not_worse, not_worse, products, relative
from timm_pair import MASSIVE, run
from torch import nn

import vitfast


@torch.no_grad()
def make_trained_like(model, images, mlps, massive=True):
    """Fill every parameter with what trained ViTs have, as `timm_pair.make_trained_like` does it to timm's.

    mlps: (norm, first Linear, second Linear) of each block.
    """
    for name, p in model.named_parameters():
        owner, kind = model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        if kind in ("bias", "in_proj_bias"):
            p.normal_(std=0.3)
        elif isinstance(owner, (nn.Linear, nn.Conv2d, nn.Conv1d)) or kind == "in_proj_weight":
            p.normal_(std=0.7 * p[0].numel() ** -0.5)
        elif kind == "weight":
            p.normal_(std=0.4).exp_()
            p[:: max(p.numel() // 4, 1)] = 10
        else:
            p.normal_(std=0.5)
    for norm, _, _ in mlps:
        norm.weight[MASSIVE] = 0.1
    hooks = [
        fc1.register_forward_pre_hook(lambda fc1, args, fc2=fc2: _write_massive_activations(args[0], fc1, fc2))
        for _, fc1, fc2 in mlps if massive
    ]  # fmt: skip
    model.eval()(images)
    for hook in hooks:
        hook.remove()
    for p in model.parameters():
        p.copy_(p.bfloat16())
    return model.train()


def _write_massive_activations(x, fc1, fc2):
    """Let one hidden unit be open for the three tokens that fit it best, and write 1e3 into one channel there."""
    best = (x @ fc1.weight[0]).flatten().topk(4).values
    fc1.weight[0] *= 4 / (best[0] - best[3])
    fc1.bias[0] = -4 * best[3] / (best[0] - best[3])
    fc2.weight[MASSIVE] = 0
    fc2.weight[MASSIVE, 0] = 1
    channel = fc2.forward(nn.functional.gelu(fc1.forward(x)))[..., MASSIVE]
    fc2.weight[MASSIVE, 0] = 1e3 / (channel.amax() - channel.amin())


def ops_in(model, *inputs):
    """Names of vitfast's ops that a call runs, each as often as it is run."""
    with Recorder() as recorder:
        model(*inputs)
    return [str(func).split(".")[1] for func, *_ in recorder.calls]


class Case:
    """A model, its patched copy, and what the model computes in fp64."""

    def __init__(self, stock, images):
        self.stock, self.images, self.patched = stock, images, copy.deepcopy(stock)
        vitfast.patch(self.patched).require("attention", "norm", "mlp")
        self.ref = copy.deepcopy(stock).double()
        with torch.no_grad():
            self.cotangent = torch.randn_like(stock(images)).bfloat16()
        self.out, grads = run(self.ref, images.double(), self.cotangent)
        # vit-pytorch has a class token of no rows where it takes the mean
        self.grads = {name: grad for name, grad in grads.items() if grad.numel()}

    def same_formula(self):
        """In fp64, where rounding hides nothing."""
        model = patched_copy(self.ref)
        out, grads = run(model, self.images.double(), self.cotangent)
        assert relative(out, self.out) < 1e-12
        for at, ref in self.grads.items():
            assert grads[at].shape == ref.shape, at
            assert relative(grads[at], ref) < 1e-9, at

    def as_exact_as_stock(self, dtype):
        """Output and every gradient, of one run in `dtype`."""
        images = self.images.to(dtype)
        with products(dtype):
            low, grads_low = run(self.stock.to(dtype), images, self.cotangent)
            out, grads = run(self.patched.to(dtype), images, self.cotangent)
        not_worse(out, self.out, low, "output")
        self.gradients_not_worse(grads, grads_low, RATIO[dtype])

    def as_exact_as_stock_in_autocast(self, dtype):
        """The typical image is judged: one with a massive activation would decide the rms of all."""
        with torch.autocast("cpu", dtype), products(torch.bfloat16):
            low, grads_low = run(self.stock, self.images, self.cotangent)
            out, grads = run(self.patched, self.images, self.cotangent)
        assert out.dtype == low.dtype
        ours_off, theirs_off = ((value - self.out).norm(dim=1) for value in (out, low))
        typical = (ours_off / theirs_off).log().mean().exp().item()
        assert typical <= RATIO[dtype], f"output under {dtype} is {typical:.2f} x as far off as that of the library"
        self.gradients_not_worse(grads, grads_low, 2.0)

    def gradients_not_worse(self, grads, grads_low, ratio):
        assert grads.keys() == grads_low.keys()
        gradients_not_worse({name: grads[name] for name in self.grads}, self.grads, grads_low, ratio)


class Counter:
    """A hook of each kind that counts its calls."""

    def __init__(self, module, kind):
        self.calls = 0
        self.handle = {
            "forward": lambda: module.register_forward_hook(self.forward),
            "pre": lambda: module.register_forward_pre_hook(self.before),
            "backward": lambda: module.register_full_backward_hook(self.forward),
        }[kind]()

    def forward(self, *args):
        self.calls += 1

    def before(self, *args):
        self.calls += 1


def three_steps(model, images, patched):
    """Parameters after three steps of SGD."""
    if patched:
        vitfast.patch(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.state_dict()


def level_after_three_steps(model, images):
    """Patched and unpatched training, to rounding; each parameter by how far it moved."""
    start = copy.deepcopy(model.state_dict())
    theirs, ours = (three_steps(copy.deepcopy(model), images, patched) for patched in (False, True))
    for at, ref in theirs.items():
        moved = (ref - start[at]).norm()
        assert (ours[at] - ref).norm() <= 1e-3 * moved + 1e-6 * ref.norm(), at
    assert any((ref - start[at]).norm() > 1e-3 for at, ref in theirs.items())
