"""Eager products on tiles: weights as they lie, activations packed."""

import pytest
import torch
from cpu_with_amx import counted, cpu, draw
from textbook import Textbook

from vitfast import ops, reference
from vitfast.check.acceptance import accept
from vitfast.kernels import cpu as cpu_kernels


@pytest.fixture
def calls(monkeypatch):
    return counted(monkeypatch)


def linear_formula(x, weight, bias, norm, norm_weight, norm_bias, act, gamma, residual):
    return reference.linear(x, weight, bias, norm_weight, norm_bias, 1e-6, norm, act, gamma, None, residual)


@pytest.fixture
def plain(monkeypatch):
    with cpu(monkeypatch, amx=False, tiles=True, VITFAST_CPU_ISA="plain_tiles"):
        yield


@pytest.mark.parametrize("rows, K, D", [(1, 32, 16), (5, 64, 48), (197, 192, 96), (70, 768, 240)])
@torch.no_grad()
def test_eager_linear_on_tiles_is_less_exact_than_stock(rows, K, D, plain, calls):
    """Norm, activation, LayerScale and residual, fused or not, bias or none, strides."""
    x, weight, bias, gamma = 3 + draw(1, rows, K), draw(D, K) * K**-0.5, draw(D), draw(D)
    residual, norm_weight, norm_bias = draw(1, D, rows).transpose(1, 2), 1 + 0.1 * draw(K), draw(K)
    strided = draw(1, K, rows).transpose(1, 2)
    for given in (
        (x, weight, bias, "none", None, None, "none", None, None),
        (strided, weight, None, "none", None, None, "quick_gelu", None, residual),
        (x, weight, bias, "layer", norm_weight, norm_bias, "gelu", None, None),
        (x, weight, bias, "layer", norm_weight, None, "none", gamma, residual),
        (x, weight, None, "layer", None, None, "silu", None, residual),
        (x, weight, bias, "rms", norm_weight, None, "gelu_tanh", None, residual),
        # as in a model whose norms stay in fp32
        (x, weight, bias, "layer", norm_weight.float(), norm_bias.float(), "none", None, None),
    ):
        x_, weight_, bias_, norm, norm_weight_, norm_bias_, act, gamma_, residual_ = given
        del calls[:]
        out = ops.linear(
            x_, weight_, bias_, norm=norm, norm_weight=norm_weight_, norm_bias=norm_bias_, act=act, gamma=gamma_,
            residual=residual_,
        )  # fmt: skip
        assert calls == ["linear_unpacked"] and out.is_contiguous()
        exact = linear_formula(*(t.double() if isinstance(t, torch.Tensor) else t for t in given))
        with Textbook():
            stock = linear_formula(*given)
        accept(out, exact, stock)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@torch.no_grad()
def test_eager_mlp_on_tiles_is_less_exact_than_stock(gated, scaled, plain, calls):
    for rows, D, hidden in ((1, 64, 128), (197, 192, 768)):
        x, gamma, row_scale = draw(2, rows, D), draw(D) if scaled else None, draw(2) if scaled else None
        w1, b1 = draw(hidden, D) * D**-0.5, draw(hidden)
        w2, b2 = draw(D, hidden // 2 if gated else hidden) * hidden**-0.5, draw(D)
        del calls[:]
        given = x, draw(D), draw(D), w1, b1, w2, b2
        out = ops.mlp(*given, gated=gated, gamma=gamma, row_scale=row_scale)
        assert calls == ["linear_unpacked"] * 2

        def formula(x, norm_weight, norm_bias, w1, b1, w2, b2, gamma, row_scale, gated=gated):
            return reference.mlp(
                x, norm_weight, norm_bias, 1e-6, "layer", w1, b1, w2, b2, "gelu", gated, gamma, row_scale
            )

        with Textbook():
            stock = formula(*given, gamma, row_scale)
        exact = formula(*(None if t is None else t.double() for t in (*given, gamma, row_scale)))
        accept(out, exact, stock)


@torch.no_grad()
def test_padding_is_given_to_linear_unpacked(plain):
    """What reads past memory: each tensor too short, of another dtype or with gaps."""
    x, weight, bias, residual = draw(3, 64), draw(32, 64), draw(32), draw(3, 32)
    good = dict(x=x, weight=weight, bias=bias, residual=residual, norm=cpu_kernels.Norm(draw(64), None, 1e-6))
    cpu_kernels.linear_unpacked(**good)
    bad = {
        "x": [x[:, :32], x.float(), draw(64, 3).t(), draw(0, 64), draw()],
        "weight": [weight.float(), draw(64, 32).t(), draw(32, 64, 1), draw(8, 64), draw(24, 64), draw(32, 40)],
        "bias": [draw(31), draw(32, 1), bias.to("meta")],
        "residual": [draw(2, 32), residual.float(), draw(32, 3).t()],
        "norm": [cpu_kernels.Norm(draw(63), None, 1e-6), cpu_kernels.Norm(draw(64).float(), None, 1e-6)],
    }
    for name, tensors in bad.items():
        for t in tensors:
            with pytest.raises(ValueError, match=f"linear_unpacked: .*{name}"):
                cpu_kernels.linear_unpacked(**good | {name: t})


@pytest.mark.parametrize("op", ["linear", "mlp"])
@torch.no_grad()
def test_fp32_under_autocast_is_left_to_stock(op, plain, calls):
    """x and the residual in fp32, where the norm is computed, weights in bf16: as exact as stock, in its dtype."""
    x, w1, w2 = draw(2, 9, 64, dtype=torch.float32), draw(64, 64), draw(64, 64)
    residual = draw(2, 9, 64, dtype=torch.float32)
    calls_of = {
        "linear": lambda: ops.linear(x, w1, norm="layer", act="gelu", residual=residual),
        "mlp": lambda: ops.mlp(x, None, None, w1, None, w2, None),
    }
    with torch.autocast("cpu", torch.bfloat16):
        out = calls_of[op]()
        assert calls == ["linear_unpacked"] * (1 if op == "linear" else 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cpu_kernels, "tiled", lambda dtype: False)
            stock = calls_of[op]()
    x, w1, w2, residual = (t.double() for t in (x, w1, w2, residual))
    accept(out, calls_of[op](), stock, dtype=torch.bfloat16)
    assert out.dtype is stock.dtype is torch.float32
