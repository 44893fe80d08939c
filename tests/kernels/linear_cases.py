"""Inputs for the kernels of norms, linear layers and MLPs, what is true of them, and what they are judged by."""

import contextlib
from dataclasses import replace
from unittest import mock

import torch
import torch.nn.functional as F
from attention_cases import INTERPRETED, draw
from textbook import Textbook

from vitfast import ops, reference
from vitfast.check.acceptance import YARDSTICK_EPS, accept, rms_ratio_of_few
from vitfast.choose.config_tables import BLAS, Product
from vitfast.kernels.operands import Norm, Projections, Saved, Tail
from vitfast.kernels.triton import layer_norm, linear, mlp

# one of each way to share a product's work, with tiles that a small test fills more than once
MECHANISMS = {
    "pointers": Product("tiles", 64, 64, 32, parts=2),
    "persistent": Product("tiles", 64, 64, 32, parts=2, descriptors=True, persistent=True),
    "ahead": Product("tiles", 64, 64, 32, parts=4, descriptors=True, persistent=True, flatten=True, ahead=True),
    "descriptors": Product("tiles", 32, 32, 64, stages=2, descriptors=True),
    "swap": Product("tiles", 16, 64, 32, descriptors=True, swap=True, split=2),
    "split": Product("tiles", 64, 64, 16, parts=2, split=4),
    "blas": BLAS,
}
ACTIVATIONS = ("none", "gelu", "gelu_tanh", "quick_gelu", "silu")


def wide(config):
    """The same with tiles that many columns and a long sum take no minutes with in the interpreter."""
    return config if config.kernel == "blas" or not INTERPRETED else replace(config, block_n=128, block_k=128)


def multiprocessors(number):
    """As on a device of so many: few have persistent programs take several tiles, many have sums be split."""
    return mock.patch.multiple(linear, multiprocessors=lambda device: number)


def shared(config, call, *args, **kwargs):
    """`call` with `config`, on a device on which its way to share the work is taken; None: as the table says."""
    if config is None:
        return call(*args, **kwargs)
    with multiprocessors(3 if config.persistent else 64):
        return call(*args, config=config, **kwargs)


def few_programs():
    """As on a device of one multiprocessor: a program of the norms' backward takes several tiles in turn."""
    return mock.patch.object(layer_norm, "multiprocessors", lambda device: 1)


def judge(out, ref, low, *, tight=None, dtype=None, grad=False, what=""):
    """`accept`, with the room for luck that few numbers have.

    tight: the yardstick where `low` is none, see `Steps`. Stock gradients of norms in fp16 on CPUs add up in fp16.
    """
    out, ref, low = (t.detach() for t in (out, ref, low))
    dtype = dtype or out.dtype
    error, scale = ((t.double().square().mean().sqrt()) for t in (low - ref, ref))
    if tight is not None and error > YARDSTICK_EPS[dtype] * torch.finfo(dtype).eps * scale:
        low = tight.detach().to(low.dtype)
    accept(out, ref, low, dtype=dtype, grad=grad, k=rms_ratio_of_few(out.numel(), dtype), what=what)


def judge_all(names, outs, refs, lows, tights=None, *, grad=True, dtype=None):
    tights = tights or [None] * len(lows)
    for name, out, ref, low, tight in zip(names, outs, refs, lows, tights, strict=True):
        assert (out is None) == (ref is None), name
        if out is not None:
            judge(out, ref, low, tight=tight, grad=grad, dtype=dtype, what=name)


def differentiated(call, tensors, cotangents, convert=lambda t: t):
    """(results of `call(**tensors)`, the gradient of each tensor or None), converted before.

    cotangents: one a result; None where nothing depends on it.
    """
    leaves = {name: None if t is None else convert(t.detach()).requires_grad_() for name, t in tensors.items()}
    results = call(**leaves)
    results = results if isinstance(results, tuple) else (results,)
    pairs = [(r, c.to(r.dtype)) for r, c in zip(results, cotangents, strict=True) if c is not None]
    given = [t for t in leaves.values() if t is not None]
    outs, grads = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outs, given, grads, allow_unused=True))
    return [r.detach() for r in results], [None if t is None else next(found) for t in leaves.values()]


def yardsticks(call, tensors, cotangents, in_steps=None):
    """`differentiated` in fp64, in the tensors' own dtypes, and in fp32 by `in_steps`."""
    return (
        differentiated(call, tensors, cotangents, lambda t: t.double()),
        differentiated(call, tensors, cotangents, lambda t: t.clone()),
        differentiated(in_steps or call, tensors, cotangents, lambda t: t.clone().float()),
    )


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, t, dtype):
        ctx.dtype = dtype
        return t.to(dtype).to(t.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad.to(ctx.dtype).to(grad.dtype), None


class Steps:
    """The formulas in fp32, rounded to `dtype` where stock operators write a result or a gradient."""

    def __init__(self, dtype):
        self.dtype = dtype

    def rounded(self, t):
        return _Rounded.apply(t, self.dtype)

    def scaled(self, y, gamma, row_scale):
        y = y if gamma is None else self.rounded(y * gamma)
        return y if row_scale is None else self.rounded(reference.scale_branch(y, None, row_scale.to(y.dtype)))

    def product(self, h, weight, bias):
        return self.rounded(F.linear(h, weight, bias))

    def linear(
        self, x, weight, bias, norm_weight, norm_bias, norm_eps, norm, act, gamma, row_scale, residual
    ):  # fmt: skip
        if norm != "none":
            x = self.rounded(reference.layer_norm(x, norm_weight, norm_bias, norm_eps, norm))
        y = self.scaled(self.rounded(reference.activation(self.product(x, weight, bias), act)), gamma, row_scale)
        return y if residual is None else residual + y

    def mlp(self, x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, norm_eps, norm, act, gated, row_scale):
        h = self.rounded(reference.layer_norm(x, norm_weight, norm_bias, norm_eps, norm))
        h = self.product(h, w1, b1)
        gate, value = h.chunk(2, dim=-1) if gated else (h, None)
        h = self.rounded(reference.activation(gate, act))
        h = self.rounded(h * value) if gated else h
        return x + self.scaled(self.product(h, w2, b2), gamma, row_scale)


def padded_by_nan(t, *, before=0, after=0, rows=0):
    """t's numbers in memory that is NaN around each row and image."""
    B, *shape = t.shape
    C = shape.pop()
    tokens = shape.pop() if shape else 1
    whole = torch.full((B, tokens + rows, C + before + after), float("nan"), dtype=t.dtype, device=t.device)
    part = whole[:, :tokens, before : before + C]
    part.copy_(t.reshape(B, tokens, C))
    return part.view(t.shape) if t.dim() != 2 else part[:, 0]


# how rows [B, T, C] come, by name; whether rows begin at multiples of 16 bytes where C is a multiple of 8
LAYOUTS = {
    "sliced": (lambda t: padded_by_nan(t, rows=2), True),
    "wide rows": (lambda t: padded_by_nan(t, before=8, after=16), True),
    "shifted": (lambda t: padded_by_nan(t, before=1, after=7), False),
    "odd rows": (lambda t: padded_by_nan(t, after=3, rows=1), False),
    "channels first": (lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), True),
    "tokens first": (lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), True),
}


def far_apart(C, dtype, device):
    """[400, C], the tile of 64 rows at 320 past 2**31 numbers; the memory between rows is never touched."""
    rows, step = 400, (1 << 23) - 8
    memory = torch.empty((rows - 1) * step + C, dtype=dtype, device=device)
    far = memory.as_strided((rows, C), (step, 1))
    far.copy_(draw(rows, C, dtype=dtype, device=device))
    assert layer_norm.rows_of(far).data_ptr() == far.data_ptr()
    return far


# linear layers


def layer(
    B, T, K, N, dtype, device, *, norm="none", act="none", gamma=False, row_scale=False, residual="none", bias=True,
    wide_x=False,
):  # fmt: skip
    """Arguments of `reference.linear` by name.

    residual: "none", "same" or "wide": in fp32. wide_x: x and the norm's parameters in fp32, as under autocast.
    """
    new = lambda *shape, seed, scale=1.0, to=dtype: draw(  # noqa: E731
        *shape, dtype=to, device=device, scale=scale, seed=seed
    )
    high = torch.float32 if wide_x else dtype
    factors = torch.tensor([2.0, 0.0, 1.25]).repeat(-(-B // 3))[:B].to(dtype).to(device)
    return {
        "x": new(B, T, K, seed=1, to=high),
        "weight": new(N, K, seed=2, scale=K**-0.5),
        "bias": new(N, seed=3) if bias else None,
        "norm_weight": 1 + new(K, seed=4, scale=0.3, to=high) if norm != "none" else None,
        "norm_bias": new(K, seed=5, to=high) if norm == "layer" else None,
        "norm_eps": 1e-6,
        "norm": norm,
        "act": act,
        "gamma": new(N, seed=6) if gamma else None,
        "row_scale": factors if row_scale else None,
        "residual": None if residual == "none" else new(
            B, T, N, seed=7, to=torch.float32 if residual == "wide" else dtype
        ),
    }  # fmt: skip


def grouped(given):
    """All that `linear.forward` takes before `saves`."""
    x, weight, bias, norm_weight, norm_bias, eps, norm, act, *tail = given.values()
    return x, weight, bias, Norm(norm_weight, norm_bias, eps, norm), act, Tail(*tail)


def by_the_book(**given):
    """`reference.linear` by products that do not depend on how few the rows are, see `Textbook`."""
    with contextlib.nullcontext() if INTERPRETED else Textbook("cuda"):
        return reference.linear(**given)


def as_double(given):
    return {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in given.items()}


def before_activation(given):
    return {**given, "act": "none", "gamma": None, "row_scale": None, "residual": None}


def check_forward(config, given, saves=False, what="", as_it_is=False):
    """One forward by the kernels, held to the rule with all that it keeps for a backward; its results.

    as_it_is: on the device as it is, and not on one where the work is shared as `config` says.
    """
    if as_it_is:
        found = linear.forward(*grouped(given), saves, config=config)
    else:
        found = shared(config, linear.forward, *grouped(given), saves)
    out, mean, rstd, pre, branch = found
    dtype = given["weight"].dtype
    judge(out, reference.linear(**as_double(given)), by_the_book(**given), dtype=dtype, what=f"{what} out")
    kept = [("pre", pre, before_activation(given)), ("branch", branch, {**before_activation(given)})]
    for name, t, how in kept:
        if t is not None:
            judge(t, reference.linear(**as_double(how)), by_the_book(**how), what=f"{what} {name}")
    assert (pre is not None) == (saves and given["act"] != "none")
    assert (branch is not None) == (saves and given["act"] == "none" and given["gamma"] is not None)
    assert (mean is not None) == (rstd is not None) == (saves and given["norm"] == "layer")
    if mean is not None:
        x = given["x"].double()
        torch.testing.assert_close(mean.double(), x.mean(-1, keepdim=True), rtol=1e-5, atol=1e-5)
        expected = (x.var(-1, correction=0, keepdim=True) + given["norm_eps"]).rsqrt()
        torch.testing.assert_close(rstd.double(), expected, rtol=1e-5, atol=0)
    return found


# MLPs


def mlp_layer(
    B, T, D, F, dtype, device, *, norm="layer", act="gelu", gated=False, gamma=False, row_scale=False, wide_x=False
):  # fmt: skip
    """Arguments of `reference.mlp` by name: (tensors that have gradients, the others).

    wide_x: x and the norm's parameters in fp32, as under autocast.
    """
    new = lambda *shape, seed, scale=1.0, to=dtype: draw(  # noqa: E731
        *shape, dtype=to, device=device, scale=scale, seed=seed
    )
    high = torch.float32 if wide_x else dtype
    inner = F // 2 if gated else F
    tensors = {
        "x": new(B, T, D, seed=1, to=high),
        "norm_weight": 1 + new(D, seed=2, scale=0.3, to=high),
        "norm_bias": new(D, seed=3, to=high) if norm == "layer" else None,
        "w1": new(F, D, seed=4, scale=D**-0.5),
        "b1": new(F, seed=5),
        "w2": new(D, inner, seed=6, scale=inner**-0.5),
        "b2": new(D, seed=7),
        "gamma": new(D, seed=8) if gamma else None,
    }
    factors = torch.tensor([2.0, 0.0, 1.25]).repeat(-(-B // 3))[:B].to(dtype).to(device)
    others = {"norm_eps": 1e-6, "norm": norm, "act": act, "gated": gated, "row_scale": factors if row_scale else None}
    return tensors, others


def mlp_by_kernels(config, tensors, others, recompute):
    """(out, a function from the gradient and who needs one to gradients in the order of the tensors)."""
    x, norm_weight, norm_bias, *weights, gamma = tensors.values()
    eps, norm, act, gated, row_scale = others.values()
    given = Norm(norm_weight, norm_bias, eps, norm), Projections(*weights, act, gated)
    out, *kept = shared(config, mlp.forward, x, *given, Tail(gamma, row_scale, x), recompute)
    saved = Saved(*kept)
    assert (saved.pre is None) == (recompute == "fc1") and (saved.hidden is not None) == (recompute == "none")

    def backward(grad, mask=(True,) * 8):
        mask = [m and t is not None for m, t in zip(mask, tensors.values(), strict=True)]
        with few_programs():
            return shared(config, mlp.backward, grad, x, *given, saved, Tail(gamma, row_scale), mask)

    return out, backward


def check_mlp(config, dtype, device, recompute, size=(2, 17, 40, 80), **how):
    tensors, others = mlp_layer(*size, dtype, device, **how)
    grad = draw(*tensors["x"].shape, dtype=tensors["x"].dtype, device=device, seed=12)

    def call(**tensors):
        row_scale = others["row_scale"]
        row_scale = row_scale if row_scale is None else row_scale.to(tensors["w1"].dtype)
        return reference.mlp(**tensors, **others | {"row_scale": row_scale})

    steps = Steps(dtype)
    beside = yardsticks(call, tensors, [grad], lambda **tensors: steps.mlp(**tensors, **others))
    out, backward = mlp_by_kernels(config, tensors, others, recompute)
    judge(out, *(results[0] for results, _ in beside[:2]), dtype=dtype, what="out")
    judge_all(tensors, backward(grad), *(grads for _, grads in beside), dtype=dtype)


# what tests on a GPU run at real sizes


def all_of_a_block(B, T, D, dtype, device, x=None):
    """A function that runs every op of a block but attention, forward and backward, and returns all that comes out."""
    x = draw(B, T, D, dtype=dtype, device=device) if x is None else x
    tensors, others = mlp_layer(B, T, D, 4 * D, dtype, device, gamma=True, row_scale=True)
    del tensors["x"]
    qkv = layer(B, T, D, 3 * D, dtype, device, norm="layer")
    proj = layer(B, T, D, D, dtype, device, gamma=True, row_scale=True)
    for t in (qkv, proj):
        del t["x"], t["residual"]
    leaves = [t for given in (tensors, qkv, proj) for name, t in given.items()
              if isinstance(t, torch.Tensor) and name != "row_scale"]  # fmt: skip
    leaves = [t.requires_grad_() for t in leaves]
    grad = draw(B, T, D, dtype=dtype, device=device, seed=9)

    def step():
        rows = x.detach().requires_grad_()
        y = ops.linear(rows, **qkv)[..., D : 2 * D]
        y = ops.linear(y, **proj, residual=rows)
        out = ops.mlp(y, **tensors, **others)
        total, normed = ops.add_layer_norm(out, y, qkv["norm_weight"], None, 1e-6)
        return total.detach(), normed.detach(), *torch.autograd.grad((total, normed), [rows, *leaves], (grad, grad))

    return step


def last_rows_alone(rows, D, dtype, device, alone):
    """An MLP's forward and backward on so many rows; the last ones are the same as alone.

    To the bit, but for the gradient: cuBLAS multiplies more rows in another way.
    """
    x = draw(1, 1, D, device=device).to(dtype).expand(1, rows, D).contiguous()
    last = slice(rows - alone, rows)
    x[:, last] = draw(1, alone, D, device=device, seed=3).to(dtype)
    tensors, others = mlp_layer(1, 1, D, D, dtype, device)
    del tensors["x"]
    grad = torch.ones(1, 1, 1, dtype=dtype, device=device).expand(x.shape)
    found = []
    for part in (x, x[:, last].clone()):
        leaf = part.requires_grad_()
        out = ops.mlp(leaf, **tensors, **others)
        (dx,) = torch.autograd.grad(out, leaf, grad[:, : part.shape[1]])
        normed = ops.layer_norm(part.detach(), tensors["norm_weight"], tensors["norm_bias"], 1e-6)
        found.append([t.detach()[:, -alone:].clone() for t in (out, dx, normed)])
        del out, dx, normed
    (out, dx, normed), (out_alone, dx_alone, normed_alone) = found
    assert torch.equal(out, out_alone) and torch.equal(normed, normed_alone)
    torch.testing.assert_close(dx, dx_alone)
