"""The attention kernels against fp64, by the rule that stock attention sets: lengths, head dims, layouts."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import (
    BACKWARD,
    DTYPES,
    FORWARD,
    INTERPRETED,
    LAYOUTS,
    PAIRS,
    check,
    draw,
    every_pair,
    exact,
    fits,
    judge,
    laid_out,
    pairs_of_kernels,
    stock,
)
from pairwise import product

from vitfast.choose import config_tables
from vitfast.kernels.operands import Extras, Starts
from vitfast.kernels.triton import attention
from vitfast.kernels.triton.launch import architecture

LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 127, 128, 129, 196, 197, 198, 257, 577)
HEAD_DIMS = (16, 24, 32, 40, 48, 64, 72, 80, 96, 112, 128)


@product(N=LENGTHS, dtype=DTYPES, strength=1)
def test_length_leaves_a_tail_out_or_reads_past_the_end(N, dtype, device):
    size = {"B": 1, "H": 1} if INTERPRETED and N > 128 else {}
    D = 72 if dtype is torch.float16 else 64
    check(dtype, D, N, N, backward=BACKWARD["blocks"], device=device, **size)


@product(
    N=(17, 129, 197, 257), forward=tuple(FORWARD), dtype=DTYPES,
    allowed=lambda case: fits("forward", FORWARD[case["forward"]], case["N"]),
)  # fmt: skip
def test_forward_kernel_is_wrong_at_a_length(N, forward, dtype, device):
    check(dtype, 64, N, N, forward=FORWARD[forward], B=1, device=device)


@product(N=(16, 17, 129, 197, 256), backward=tuple(BACKWARD), dtype=DTYPES)
def test_backward_kernel_is_wrong_at_a_length(N, backward, dtype, device):
    check(dtype, 64, N, N, backward=BACKWARD[backward], B=1, device=device)


@product(
    D=HEAD_DIMS, forward=tuple(FORWARD), backward=tuple(BACKWARD), dtype=DTYPES,
    # each of both with each head dim, and not every pair: compiling them takes a GPU's run minutes
    allowed=lambda case: (list(FORWARD).index(case["forward"]) - list(BACKWARD).index(case["backward"])) % 3 == 0,
)  # fmt: skip
def test_head_dim_is_padded_wrongly_or_sets_the_scale(D, forward, backward, dtype, device):
    check(dtype, D, 33, 33, forward=FORWARD[forward], backward=BACKWARD[backward], device=device)


# of other architectures not on a GPU, whose memory may be too small
ARCHS = config_tables.ARCHITECTURES if INTERPRETED else (architecture(torch.device("cuda", 0)),)


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_configuration_of_a_table_is_wrong_at_the_widest_head_that_it_is_for(direction, device):
    table = getattr(config_tables, direction.upper())
    for row in dict.fromkeys(row for arch in ARCHS for row in table[arch]):
        dtype = torch.float16 if row.bits == 16 else torch.float32
        both = {"backward": BACKWARD["blocks"]} | {direction: row.config}
        check(dtype, row.width, 33, 33, **both, B=1, H=1, device=device)


@product(layout=LAYOUTS, dtype=DTYPES, strength=1)
def test_stride_is_ignored(layout, dtype, device):
    D = 72 if dtype is torch.float16 else 64
    # there are more of the second
    for forward, backward in zip(itertools.cycle(FORWARD.values()), BACKWARD.values(), strict=False):
        found = check(dtype, D, 33, 33, forward=forward, backward=backward, layout=layout, device=device)
        plain = [t.contiguous() for t in laid_out(layout, 2, 33, 33, 2, D, dtype, device)]
        for got, expected in zip(found, attention.forward(*plain, D**-0.5, config=forward), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("layout", [*LAYOUTS, "lengths", "packed sequences"])
def test_bulk_copies_bring_what_they_cannot_or_must_not(layout, monkeypatch, device):
    """Rows that lie in one another; rows behind an image's last key, which are another image's or may hold NaN."""
    boxes, launch = [], attention.launch

    def started(*given, **more):
        boxes.extend(box for box in more["boxes"] if box)
        launch(*given, **more)

    monkeypatch.setattr(attention, "launch", started)
    extras, starts = Extras(), None
    if layout == "lengths":
        extras = Extras(torch.tensor([9, 70], dtype=torch.int32, device=device))
    if layout == "packed sequences":
        at = torch.tensor([0, 9, 70], dtype=torch.int32, device=device)
        starts = Starts(at, at, 61, 61)
    lies, images = layout if layout in LAYOUTS else "separate", 1 if starts else 2
    heads = laid_out(lies, images, 70, 70, 2, 72, torch.float16, device)
    grad = draw(*heads[0].shape[:2], 144, dtype=torch.float16, device=device)
    refused = layout in ("expanded", "lengths", "packed sequences")

    def both(**changed):
        boxes.clear()
        out, lse = attention.forward(*heads, 0.1, extras, starts, config=replace(FORWARD["descriptors"], **changed))
        yield from (out, lse)
        assert boxes == ([] if refused or changed else [[1, 1, 64, w] for w in (64, 64, 16, 16)])
        boxes.clear()
        config = replace(BACKWARD["descriptors"], **changed)
        yield from attention.backward(grad, *heads, out, lse, 0.1, extras, starts, config=config)
        assert boxes == ([] if refused or changed else 2 * [[1, 1, 32, w] for w in (64, 64, 16, 16)])

    for got, expected in zip(list(both()), list(both(descriptors=False)), strict=True):
        assert torch.equal(got, expected)


def test_a_key_that_no_query_sees_gets_nan(device):
    """Of infinities, of which rows of zeros past the last query would make NaN."""
    q, k, v = (draw(1, 33, 2, 64, device=device, seed=i) for i in range(3))
    grad = draw(1, 33, 128, device=device, seed=9)
    q[..., 5] = q[..., 5].abs() + 1
    k[0, 7, :, 5] = float("-inf")
    out, lse = attention.forward(q, k, v, 0.125)
    for config in BACKWARD.values():
        _, dk, dv = attention.backward(grad, q, k, v, out, lse, 0.125, config=config)
        assert dk.isfinite().all() and dv.isfinite().all() and not dk[0, 7].any() and not dv[0, 7].any()


@product(lengths=((1, 197), (1, 17), (65, 33), (33, 130), (17, 577)), dtype=DTYPES, strength=1)
def test_keys_of_another_number_than_queries(lengths, dtype, device):
    Nq, Nk = lengths
    for forward, backward in PAIRS:
        forward, backward = FORWARD[forward], BACKWARD[backward]
        if fits("forward", forward, Nk) and fits("backward", backward, Nk):
            how = {"layout": "separate", "B": 1, "device": device}
            check(dtype, 64, Nq, Nk, forward=forward, backward=backward, **how)


@every_pair
@pytest.mark.parametrize("sign", (1, -1))
def test_large_logits_overflow(sign, forward, backward, device):
    """Logits of some 3e5, where weights are ones and zeros; of whole numbers, which all sums have exactly.

    Where all are negative, exp(0 - lse) of what lies past the end is infinite.
    """
    q, k = (draw(1, 65, 2, 64, device=device, seed=i).mul(80).round() for i in range(2))
    v, grad = draw(1, 65, 2, 64, device=device, seed=2), draw(1, 65, 128, device=device, seed=3)
    if sign > 0:
        q[:, ::7] = k[:, ::7].clone()
    else:
        q, k = -q.abs(), k.abs()
    ref, low = exact(q, k, v, 1.0, grad), stock(q, k, v, 1.0, grad)
    assert ref[1].max() > 3e5 if sign > 0 else ref[1].max() < -5e4
    out, lse = attention.forward(q, k, v, 1.0, config=FORWARD[forward])
    grads = attention.backward(grad, q, k, v, out, lse, 1.0, config=BACKWARD[backward])
    torch.testing.assert_close(lse.double(), ref[1], rtol=2e-7, atol=0)
    judge(out, ref[0], low[0], what="out")
    for name, *three in zip(("dq", "dk", "dv"), grads, ref[2:], low[1:], strict=True):
        judge(*three, grad=True, what=name)


@product(where=("q", "k", "v"), bad={"nan": float("nan"), "inf": float("inf")}, **pairs_of_kernels)
def test_one_bad_image_spoils_another(where, bad, forward, backward, device):
    """NaN and infinities stay in their image and head, and are not lost there."""
    q, k, v = (draw(2, 33, 2, 64, device=device, seed=i) for i in range(3))
    grad = draw(2, 33, 128, device=device, seed=9)
    good = attention.forward(q, k, v, 0.125, config=FORWARD[forward])
    good += attention.backward(grad, q, k, v, *good, 0.125, config=BACKWARD[backward])
    {"q": q, "k": k, "v": v}[where][1, 7, 1, 5] = bad
    out, lse = attention.forward(q, k, v, 0.125, config=FORWARD[forward])
    grads = attention.backward(grad, q, k, v, out, lse, 0.125, config=BACKWARD[backward])
    ref = exact(q, k, v, 0.125, grad)
    assert torch.equal(out.isnan(), ref[0].isnan()) and torch.equal(out.isinf(), ref[0].isinf())
    for got, expected in zip((out, *grads), (good[0], *good[2:]), strict=True):
        got, expected = got.view(2, 33, 2, 64), expected.view(2, 33, 2, 64)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1, :, 0], expected[1, :, 0])
    for got, expected in zip(grads, ref[2:], strict=True):
        assert torch.isfinite(got[1, :, 1]).all() == torch.isfinite(expected[1, :, 1]).all()


@pytest.mark.alone
def test_row_past_two_to_the_31_is_read_elsewhere(device):
    """The last image and row of tensors whose offsets need 64 bits; the memory between is never touched."""
    D, step = 16, (1 << 31) + 16
    memory = torch.empty(2 * step + 64 * D, dtype=torch.float16, device=device)
    for strides in ((step, D, D, 1), (D, step, D, 1)):
        q, k, v = (memory.as_strided((2, 2, 1, D), strides, i * 4 * D) for i in range(3))
        for i, t in enumerate((q, k, v)):
            t.copy_(draw(2, 2, 1, D, dtype=torch.float16, seed=i))
        plain = [t.clone(memory_format=torch.contiguous_format) for t in (q, k, v)]
        grad = draw(2, 2, D, dtype=torch.float16, device=device)
        for forward in FORWARD.values():
            far, found = (attention.forward(*three, 0.25, config=forward) for three in ((q, k, v), plain))
            assert all(map(torch.equal, far, found))
        for backward in BACKWARD.values():
            far, near = (
                attention.backward(grad, *three, *found, 0.25, config=backward) for three in ((q, k, v), plain)
            )
            assert all(map(torch.equal, far, near))


def test_gradient_is_written_beside_its_place(device):
    """Into the packed gradient, whose memory holds NaN: all of it is written, in every kernel."""
    q, k, v = laid_out("packed", 2, 33, 33, 2, 72, torch.float32, device)
    grad = draw(2, 33, 144, device=device)
    out, lse = attention.forward(q, k, v, 0.1)
    for config in BACKWARD.values():
        apart = attention.backward(grad, q, k, v, out, lse, 0.1, config=config)
        packed = torch.full((2, 33, 3, 2, 72), float("nan"), device=device)
        attention.backward(grad, q, k, v, out, lse, 0.1, config=config, into=packed.unbind(2))
        assert torch.equal(packed, torch.stack(apart, dim=2))


def test_two_runs_differ(device):
    N = 33 if INTERPRETED else 197
    q, k, v = laid_out("packed", 2, N, N, 3, 64, torch.float16, device)
    grad = draw(2, N, 192, dtype=torch.float16, device=device)
    for forward, backward in PAIRS:
        forward, backward = FORWARD[forward], BACKWARD[backward]
        first = attention.forward(q, k, v, 0.125, config=forward)
        gradients = attention.backward(grad, q, k, v, *first, 0.125, config=backward)
        for _ in range(1 if INTERPRETED else 250):
            assert all(map(torch.equal, attention.forward(q, k, v, 0.125, config=forward), first))
            again = attention.backward(grad, q, k, v, *first, 0.125, config=backward)
            assert all(map(torch.equal, again, gradients))
