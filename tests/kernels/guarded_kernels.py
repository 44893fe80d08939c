"""Every kernel on guarded memory: run by test_guarded.py and guarded_matrix.py, each group in a process of its own.

Whatever a kernel is given, makes or writes ends or begins at memory that faults (see guarded_memory.py), and is NaN
until somebody writes it. So a case is wrong where its process dies, or where not all of its results are finite: of
what numbers they are other tests know. In `make test` each two things meet in some case, in `make matrix` all that
decide where a kernel reads and writes.
"""

import contextlib
import itertools
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch
from attention_cases import BACKWARD, FORWARD, draw, fits
from guarded_memory import EVERY, MODELS, PLACEMENTS, PLACES, cases, columns, finite, model_of, shifted
from linear_cases import ACTIVATIONS, MECHANISMS, few_programs, layer, mlp_layer, multiprocessors
from triton.runtime import interpreter

import vitfast
from vitfast import ops
from vitfast.choose import config_tables, dispatch
from vitfast.choose.config_tables import BLAS, WHOLE
from vitfast.kernels.operands import Norm, Projections, Tail
from vitfast.kernels.triton import attention, layer_norm, linear, mlp, mlp_gated
from vitfast.kernels.triton.linear import After, Folded

WIDTHS = (64, 192, 384, 768, 1152)
every_place = {"place": tuple(PLACES)}


def gradients(out, leaves):
    """Of all leaves that need one, from a gradient of all ones in memory of its own."""
    leaves = [t for t in leaves if t is not None]
    outs = out if isinstance(out, tuple) else (out,)
    return torch.autograd.grad(outs, leaves, [torch.ones_like(t) for t in outs])


def leaf(t):
    return None if t is None else t.detach().requires_grad_()


def named(configs):
    """By what tells them apart; of warps and stages, and of the ways to share these, the interpreter knows nothing."""
    configs = (replace(config, warps=4, stages=2) for config in configs)
    return {"-".join(str(value) for value in config.as_dict().values()): config for config in configs}


# norms


@cases(
    C=(8, 72, 192, 197, 384, 768, 1000, 1152, 4096, 8192), shape=((1, 1), (3, 19), (2, 65)), kind=("layer", "rms"),
    form=("alone", "sum", "scaled sum", "wide sum", "vector"), programs=("few", "many"),
    dtype=(torch.float16, torch.float32), **every_place, together=("C", "kind", "form", "place"),
    # many wide rows take their time
    allowed=lambda case: EVERY or case["C"] * math.prod(case["shape"]) < 1 << 16,
)  # fmt: skip
def test_norm(C, shape, kind, form, programs, dtype, place, placement):
    """A row too many of a tile, a column past the end, the sums of a program that there is not."""
    high = torch.float32 if form == "wide sum" else dtype
    new = lambda *shape, seed, to=high: draw(*shape, dtype=to, seed=seed)  # noqa: E731
    x, weight = leaf(PLACES[place](new(*shape, C, seed=1))), leaf(new(C, seed=2))
    bias = leaf(new(C, seed=3)) if kind == "layer" else None
    with mock.patch.object(layer_norm, "multiprocessors", lambda device: {"few": 1, "many": 64}[programs]):
        if form == "vector":
            x, vector, total = x.detach(), new(C, seed=6, to=torch.float32), torch.empty_like(x).contiguous()
            norm = Norm(weight.detach(), None if bias is None else bias.detach(), 1e-6, kind)
            for written in (None, total, x if x.is_contiguous() else None):
                found = layer_norm.forward(x, norm, dtype, added=vector, total=written, statistics=False)
                finite(found=found[:2])
            return
        if form == "alone":
            out = ops.layer_norm(x, weight, bias, 1e-6, kind)
            finite(out=out, gradients=gradients(out, [x, weight, bias]))
            return
        branch, gamma, row_scale = leaf(PLACES[place](new(*shape, C, seed=4, to=dtype))), None, None
        if form == "scaled sum":
            gamma, row_scale = leaf(new(C, seed=5)), torch.arange(shape[0]).to(dtype)
        out = ops.add_layer_norm(x, branch, weight, bias, 1e-6, kind, gamma, row_scale)
        finite(out=out, gradients=gradients(out, [x, branch, weight, bias, gamma]))


# products

TILES = [row.config for arch in config_tables.ARCHITECTURES for row in config_tables.PRODUCT[arch]]
PRODUCTS = named(config for config in [*TILES, *MECHANISMS.values(), BLAS] if config.kernel != "whole")
# so long that a sum is split in two where it may be, and that the last step of it is whole or not
DEPTHS = {
    "short": lambda config: 72,
    "whole": lambda config: 2 * (config.block_k or 32) * min(config.split, 2),
    "cut": lambda config: 2 * (config.block_k or 32) * min(config.split, 2) + 24,
}
ROWS = {"one": lambda config: 1, "few": lambda config: 7, "a tile and a row": lambda config: (config.block_m or 32) + 1}


def tried(kernel, config):
    """`kernel` with this configuration, on a device on which its way to share the work is taken."""
    stack = contextlib.ExitStack()
    stack.enter_context(multiprocessors(3 if config.persistent else 64))
    stack.enter_context(dispatch.trying(kernel, "kernel", config.as_dict()))
    return stack


FORMS = {
    "plain": {},
    "norm": {"norm": "layer", "act": "gelu"},
    "rms": {"norm": "rms", "bias": False},
    "residual": {"residual": "same", "bias": False},
    "scaled residual": {"residual": "same", "gamma": True, "row_scale": True},
    "wide residual": {"residual": "wide", "norm": "layer", "wide_x": True},
}


@cases(
    product=tuple(PRODUCTS), rows=tuple(ROWS), N=(72, 197, *WIDTHS), K=tuple(DEPTHS), form=tuple(FORMS), **every_place,
    training=(False, True), dtype=(torch.float16, torch.float32), together=("product", "form", "place", "training"),
    allowed=lambda case: case["place"] != "one number for all" or case["N"] < 384,
)  # fmt: skip
def test_linear(product, rows, N, K, form, place, training, dtype, placement):
    """A tile's rows, columns or depth past the end, a split sum's partial ones, an output that nobody asked for."""
    config = PRODUCTS[product]
    given = layer(2, ROWS[rows](config), DEPTHS[K](config), N, dtype, "cpu", **FORMS[form])
    given |= {name: PLACES[place](given[name]) for name in ("x", "residual") if given[name] is not None}
    if place in ("shifted", "last columns"):
        given["weight"] = PLACES[place](given["weight"])
    names = ("x", "weight", "bias", "norm_weight", "norm_bias", "gamma", "residual")
    if training:
        given |= {name: leaf(given[name]) for name in names}
    with tried("linear", config):
        out = ops.linear(**given)
    finite(out=out, gradients=gradients(out, [given[name] for name in names]) if training else None)


@cases(
    product=tuple(PRODUCTS), rows=tuple(ROWS), N=(72, *WIDTHS), form=("pieces", "norm", "rms", "columns"),
    K=tuple(DEPTHS), together=("product", "N", "form", "K"),
)  # fmt: skip
def test_statistics(product, rows, N, form, K, placement):
    """Pieces of rows where a tile reaches over the last column: written by one product, read by the next."""
    config = PRODUCTS[product]
    M, K, dtype = 2 * ROWS[rows](config), DEPTHS[K](config), torch.float16
    x, w1, residual = (draw(*shape, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
    w2, b1 = draw(136, N, dtype=dtype, scale=N**-0.5), draw(N, dtype=dtype)
    with multiprocessors(3 if config.persistent else 64):
        if form == "columns":
            after = After(dtype, act="gelu", slope=True, aside=True, sums=True, beside=residual)
            finite(all=linear.product(x, w1.t().contiguous(), after, config, across=True))
            return
        out, pieces = linear.forward_with_pieces(x, w1, b1, residual, config)
        finite(out=out, pieces=pieces)
        kind, pieces = "rms" if form == "rms" else "layer", pieces if form == "pieces" else None
        folded = Folded(w2, w2.float().sum(1), torch.zeros(136), kind, pieces=pieces, eps=1e-6)
        finite(next=linear.folded_forward(out, folded, "gelu", config))


# MLPs

MLPS = PRODUCTS | named(config for table in WHOLE.values() for config in table.values())


def _mlp_can(case):
    """One kernel for all wants a width of its own, aligned rows, and no more than that to do."""
    if not case["product"].startswith("whole"):
        return True
    return case["form"] != "gated" and case["recompute"] == "fc1" and case["D"] in (64, 192) and (
        case["place"] in ("whole", "first columns", "last columns", "one image for all")
    )  # fmt: skip


@cases(
    product=tuple(MLPS), rows=tuple(ROWS), D=(40, 64, 192), form=("plain", "scaled", "gated", "wide"),
    recompute=("none", "act", "fc1"), act=ACTIVATIONS[1:], training=(False, True), **every_place,
    together=("product", "form", "recompute", "place"),
    allowed=lambda case: _mlp_can(case) and (case["form"] != "scaled" or case["product"][:5] != "whole"
                                             or not case["training"])
    and not (case["form"] == "wide" and case["product"].startswith("whole")),
)  # fmt: skip
def test_mlp(product, rows, D, form, recompute, act, training, place, placement):
    """Both products of an MLP and, on the way back, the slope with its sums of columns; gates; one kernel for all."""
    config = MLPS[product]
    how = {"gamma": form == "scaled", "row_scale": form == "scaled", "gated": form == "gated", "wide_x": form == "wide"}
    tensors, others = mlp_layer(2, ROWS[rows](config), D, 128, torch.float16, "cpu", act=act, **how)
    tensors["x"] = PLACES[place](tensors["x"])
    if training:
        tensors = {name: leaf(t) for name, t in tensors.items()}
    with tried("mlp", config):
        out = ops.mlp(**tensors, **others, recompute=recompute)
    found = None
    if training:
        with few_programs(), tried("mlp_backward", BLAS if config.kernel == "whole" else config):
            found = gradients(out, tensors.values())
    finite(out=out, gradients=found)


# attention

ATTENTION = {
    direction: named(itertools.chain((row.config for arch in config_tables.ARCHITECTURES for row in table[arch]), more))
    for direction, table, more in (
        ("forward", config_tables.FORWARD, FORWARD.values()),
        ("backward", config_tables.BACKWARD, BACKWARD.values()),
    )
}
# of keys in one, two and three parts
LENGTHS = ((1, 1), (17, 5), (65, 65), (100, 100), (30, 150))
EXTRAS = ("none", "lengths", "dropout", "packed sequences")


def _attention_can(case):
    forward, backward = ATTENTION["forward"][case["forward"]], ATTENTION["backward"][case["backward"]]
    packed = case["extras"] == "packed sequences"
    if packed and (forward.kernel != "online" or backward.kernel != "blocks"):
        return False
    if case["heads"] == "packed" and case["lengths"][0] != case["lengths"][1]:
        return False
    keys = case["lengths"][1]
    return fits("forward", forward, keys) and fits("backward", backward, keys)


HEADS = {
    "separate": lambda t: t.clone(),
    "packed": None,
    "shifted": shifted,
    "first columns": lambda t: columns(t, 0, 8),
    "last columns": lambda t: columns(t, 8, 0),
    "one image for all": lambda t: t[:1].clone().expand_as(t),
    "one head for all": lambda t: t[:, :, :1].clone().expand_as(t),
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
}


@cases(
    forward=tuple(ATTENTION["forward"]), backward=tuple(ATTENTION["backward"]), lengths=LENGTHS,
    D=(16, 40, 64, 72, 80, 96, 128), heads=tuple(HEADS), extras=EXTRAS, dtype=(torch.float16, torch.float32),
    allowed=_attention_can, together=("forward", "backward", "heads"),
)  # fmt: skip
def test_attention(forward, backward, lengths, D, heads, extras, dtype, placement):
    """Queries or keys past the end, columns of a padded head, sums that a half of the backward leaves the other."""
    (Nq, Nk), H = lengths, 2
    B = 2 if Nk < 65 else 1
    q, k, v = (draw(B, n, H, D, dtype=dtype, seed=i) for i, n in enumerate((Nq, Nk, Nk)))
    if heads == "packed":
        leaves = [leaf(torch.stack([q, k, v], 2))]
        q, k, v = leaves[0].unbind(2)
    else:
        leaves = [leaf(HEADS[heads](t)) for t in (q, k, v)]
        q, k, v = leaves
    how = {"dropout_p": 0.3} if extras == "dropout" else {}
    if extras == "lengths":
        how = {"lengths": torch.tensor([Nk // 2, Nk][:B], dtype=torch.int32)}
    with dispatch.trying("attention", "kernel", ATTENTION["forward"][forward].as_dict()):
        if extras == "packed sequences":
            starts = [torch.tensor([0, n // 3, B * n], dtype=torch.int32) for n in (Nq, Nk)]
            out, lse = ops.attention_varlen(*(t.flatten(0, 1) for t in (q, k, v)), *starts, return_lse=True)
        elif heads == "packed" and extras == "none":
            out, lse = ops.attention_qkv(leaves[0], return_lse=True)
        else:
            out, lse = ops.attention(q, k, v, **how, return_lse=True)
    with dispatch.trying("attention_backward", "kernel", ATTENTION["backward"][backward].as_dict()):
        finite(out=out, gradients=gradients(out, leaves))
    # of an image without keys it is -inf
    assert not lse.isnan().any()


# prepared models


@cases(
    product=("table", *PRODUCTS), width=WIDTHS, changes=tuple(MODELS), images=(1, 3, 14),
    together=("product", "width", "changes"), for_later=lambda case: case["width"] > 384,
    # every product has these columns above
    allowed=lambda case: EVERY or case["width"] < 192 or (
        case["product"] == "table" and case["images"] < 14 and (case["width"] < 768 or case["changes"] == "plain")
    ),
)  # fmt: skip
def test_prepared_model(product, width, changes, images, placement, monkeypatch):
    """What one product leaves for the next, as `vitfast.prepare` has them follow one another."""
    model = model_of(width, changes).eval().half()
    if product != "table":
        config = PRODUCTS[product]
        monkeypatch.setitem(config_tables.PRODUCT, 90, [config_tables.ProductRow(config)])
        monkeypatch.setattr(linear, "multiprocessors", lambda device: 3 if config.persistent else 64)
    prepared = vitfast.prepare(model)
    images = draw(images, 3, 24, 24, dtype=torch.float16)
    # of the logits the last block has class tokens only
    finite(out=prepared(images) if len(images) == 1 else prepared.forward_features(images))


# far ends


@pytest.fixture
def last_programs(monkeypatch):
    """Of the grids of these modules only the last two programs run, whose places need more than 32 bits."""
    builder = interpreter.interpreter_builder

    def launch(kernel, grid, *given, **more):
        at, few = builder.set_grid_idx, (min(2, grid[0]), *grid[1:])
        with monkeypatch.context() as patch:
            patch.setattr(builder, "set_grid_dim", lambda x, y, z: set_dim(*grid, *(1,) * (3 - len(grid))))
            patch.setattr(builder, "set_grid_idx", lambda x, y, z: at(x + grid[0] - few[0], y, z))
            start(kernel, few, *given, **more)

    start, set_dim = linear.launch, builder.set_grid_dim
    for module in (attention, mlp_gated, layer_norm, linear, mlp):
        monkeypatch.setattr(module, "launch", launch)


def one_row(*shape, dtype=torch.float16):
    """So many rows in the memory of one."""
    return draw(*(1 for _ in shape[:-1]), shape[-1], dtype=dtype).expand(shape)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("kernel", ["norm", "linear", "slope", "pieces", "split", "gated", "whole", "attention"])
def test_far(kernel, placement, last_programs, monkeypatch):
    """The last programs of grids whose results are more than 2**31 numbers: where they write is past 32 bits.

    What the others would have written is never touched, and 0: of so much memory nothing is filled.
    """
    C = {"norm": 4096, "gated": 1024, "whole": 192, "split": 256}.get(kernel, 64)
    M = (1 << 31) // C + 100
    x, weight, norm = one_row(M, C), draw(64, C, dtype=torch.float16), Norm(None, None, 1e-6, "layer")
    if kernel == "norm":
        out = layer_norm.forward(x, norm, x.dtype, statistics=False)[1]
    elif kernel in ("linear", "slope"):
        after = After(x.dtype, act="gelu", slope=kernel == "slope", beside=x)
        out = linear.product(x, weight, after, MECHANISMS["pointers"])[0]
    elif kernel == "pieces":
        x = one_row((1 << 31) // 14 + 100, C)
        config = replace(MECHANISMS["pointers"], parts=8)
        _, _, pieces = linear.product(x, weight, After(x.dtype, beside=x, pieces=True), config)
        assert pieces.numel() > 1 << 31
        out = pieces[-1].t()
    elif kernel == "split":
        # as if three of the four programs of each tile had come already
        monkeypatch.setattr(linear, "multiprocessors", lambda device: 1 << 30)
        monkeypatch.setattr(linear, "counters", lambda device, tiles: torch.full((tiles,), 3, dtype=torch.int32))
        out = linear.product(x, weight, After(x.dtype), MECHANISMS["split"])[0]
    elif kernel == "gated":
        out = mlp_gated.forward(one_row(M, 2 * C), "silu")
    elif kernel == "whole":
        fc = Projections(weight, None, weight.t(), None, "gelu", False)
        out = mlp.whole(x, norm, fc, Tail(residual=x), WHOLE[80][192])
    else:
        qkv = one_row(M // 16, 16, 3, 1, C)
        out = attention.forward(*qkv.unbind(2), 0.1, config=FORWARD["online small"])[0].flatten(0, 1)
    finite(out=out[-2:])
    assert out[-2:].any(-1).all()
