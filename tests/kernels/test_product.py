"""The product by turns beside fp64 and stock operators: on a card of compute capability 9.0, or run on the host."""

import pytest
import torch
from attention_cases import INTERPRETED, draw
from patch_cases import judge, kernels  # noqa: F401

from vitfast import ops, reference
from vitfast.check.calls import Call, Like
from vitfast.check.families import FAMILIES
from vitfast.choose import builtin, config_tables, dispatch
from vitfast.kernels.cuda import product
from vitfast.kernels.triton import linear

HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def turns(kernels, device):  # noqa: F811
    """The launcher; skips where the kernel cannot run."""
    product._tiles.cache_clear()
    if why := product.device_reasons(torch.device(device)):
        pytest.skip(why[0])
    yield product
    product._tiles.cache_clear()


def given(M, K, N, *, dtype, device, parts=0):
    """Arguments of `folded_linear` up to the pieces, of rows whose mean matters."""
    x = (draw(M, K, dtype=torch.float32, device=device) + draw(M, 1, dtype=torch.float32, device=device)).to(dtype)
    weight, bias = draw(N, K, dtype=dtype, device=device, scale=K**-0.5), draw(N, dtype=torch.float32, device=device)
    pieces = None
    if parts:
        square, mean = torch.var_mean(x.float().view(M, parts, -1), -1, correction=0)
        pieces = torch.stack([mean.T, square.T * (K // parts)], 1).contiguous()
    return x, weight, weight.float().sum(1), bias, bias.to(dtype), pieces


def by_op(args, norm, act, backend, config=None):
    with dispatch.trying("folded_linear", backend, config and config.as_dict()):
        return ops.linear_folded.folded_linear(*args, 1e-5, norm, act)


# overhanging rows and columns; one row; more tiles than blocks take at once, and depths of no whole stage
SHAPES = [(300, 72, 264), (1, 264, 8), (700, 328, 136)]


@pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_by_turns_is_less_exact_than_stock(shape, dtype, turns, device):
    """Every tile, with statistics of parts; those of a kernel too where the interpreter can make them."""
    M, K, N = shape
    forms = [("layer", "gelu", 4), ("rms", "none", 2), ("layer", "gelu_tanh", 1)]
    # the interpreter's bf16 is wrong
    forms += [("layer", "none", 0), ("rms", "gelu", 0)] if dtype is torch.float16 or not INTERPRETED else []
    for number, config in enumerate(turns.configs(torch.device(device))):
        for norm, act, parts in forms[number::2] if INTERPRETED else forms:
            args = given(M, K, N, dtype=dtype, device=device, parts=parts)
            x, weight, _, bias, *_ = (None if t is None else t.double() for t in args)
            true = reference.linear(x, weight, bias, None, None, 1e-5, norm, act)
            if INTERPRETED and dtype is torch.bfloat16:
                x, weight, sums, bias, _, pieces = args
                out = turns.product(
                    x, weight, bias, act, config, column_sums=sums, pieces=pieces, kind=norm, eps=1e-5
                )  # fmt: skip
            else:
                out = by_op(args, norm, act, "kernel", config)
            judge(out, true, by_op(args, norm, act, "stock"), dtype=dtype, what=f"{norm} {act} {parts} {config}")


def test_rows_that_begin_anywhere_are_copied_in_bulk(turns, device, monkeypatch):
    """Where a configuration was tuned for whole classes of shapes, the Triton kernel takes the others."""
    started = []
    right = turns.product
    monkeypatch.setattr(turns, "product", lambda *args, **more: started.append(0) or right(*args, **more))
    for K, act, expected in ((68, "gelu", 0), (72, "silu", 0), (72, "gelu", 1)):
        args = given(40, K, 16, dtype=torch.float16, device=device, parts=2)
        out = by_op(args, "layer", act, "kernel", turns.configs(torch.device(device))[0])
        x, weight, _, bias, *_ = (t.double() for t in args)
        true = reference.linear(x, weight, bias, None, None, 1e-5, "layer", act)
        judge(out, true, by_op(args, "layer", act, "stock"))
        assert len(started) == expected


def test_memory_beside_a_tensor_of_the_product_is_read(turns, device):
    """One argument wrong at a time."""
    x, weight, sums, bias, _, pieces = given(24, 72, 16, dtype=torch.float16, device=device, parts=6)
    mean, rstd = (draw(24, dtype=torch.float32, device=device) for _ in range(2))
    config = turns.configs(torch.device(device))[0]
    good = dict(x=x, weight=weight, bias=bias, act="gelu", config=config, column_sums=sums)
    by_parts, by_rows = good | dict(pieces=pieces), good | dict(mean=mean, rstd=rstd)
    for call in (by_parts, by_rows, dict(list(good.items())[:-1])):
        turns.product(**call)
    gaps = torch.zeros(24, 80, dtype=torch.float16, device=device)
    wrong = [
        (by_parts, name, other)
        for name, t in by_parts.items()
        if isinstance(t, torch.Tensor)
        for other in (t[..., :-1], t[:-1], t.double(), t.to("meta"), t[None])
    ]
    wrong += [(by_rows, name, other) for name in ("mean", "rstd") for other in (mean[:-1], mean.half(), mean[None])]
    wrong += [
        (by_rows, "pieces", pieces), (by_rows, "rstd", None), (by_parts, "pieces", pieces[:0]), (good, "act", "silu"),
        (by_parts, "pieces", pieces.transpose(0, 1)), (by_rows, "x", gaps[:, 1:73]), (by_rows, "x", x[:0]),
        (by_rows, "x", x[:1].expand(24, 72)), (by_rows, "config", config_tables.BLAS), (by_rows, "x", x.bfloat16()),
    ]  # fmt: skip
    for call, name, other in wrong:
        with pytest.raises(ValueError, match="product: "):
            turns.product(**{**call, name: other})
    turns.product(**{**by_rows, "x": gaps[:, :72]})


def test_product_by_turns_is_somebodys_default(turns, device):
    """A candidate until a card has measured it, offered where it can run."""
    for arch in config_tables.ARCHITECTURES:
        everything = [row.config for row in config_tables.PRODUCT[arch]]
        everything += [
            config_tables.Product(**each) for each in builtin.configs(arch, "folded_linear", "linear", "mlp")
        ]
        assert "turns" not in {config.kernel for config in everything}
    args = given(24, 72, 16, dtype=torch.float16, device=device, parts=3)
    assert "turns" not in {config.kernel for config in linear.configs(torch.device(device), torch.float16, 24, 16, 72)}
    likes = [Like(tuple(t.shape), t.stride(), t.dtype) for t in args]
    offered = FAMILIES["folded_linear"].configs(
        Call("folded_linear", (*likes, 1e-5, "layer", "gelu")), torch.device(device)
    )
    assert [each["kernel"] == "turns" for each in offered] == [False] * (len(offered) - 2) + [True] * 2
    assert config_tables.Product(**offered[-1]) in turns.configs(torch.device(device))
