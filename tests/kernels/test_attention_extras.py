"""Dropout, padding and packed sequences in the attention kernels, and the ops that run them."""

import importlib

import pytest
import torch
from attention_cases import BACKWARD, DTYPES, FORWARD, INTERPRETED, draw, every_dtype, judge, pairs_of_kernels, stock
from launches import Launches
from pairwise import product
from torch.utils.checkpoint import checkpoint

from vitfast import ops, reference
from vitfast.kernels.operands import Extras, Starts
from vitfast.kernels.triton import attention
from vitfast.ops._attention_stock import attention_formula, attention_formula_backward, key_is_there


def tensors(B, Nq, Nk, H, D, dtype, device):
    q, k, v = (draw(B, n, H, D, dtype=dtype, device=device, seed=i) for i, n in enumerate((Nq, Nk, Nk)))
    return q, k, v, draw(B, Nq, H * D, dtype=dtype, device=device, seed=8)


def rounded(q, k, v, grad, scale, lengths, dropout_p, seed):
    """The formula in fp32 with weights and their gradient rounded to the dtype before products, as stock kernels do."""
    dtype, shape = q.dtype, (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    q, k, v, grad = (t.float() for t in (q, k, v, grad.view(q.shape)))
    logits = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    if lengths is not None:
        logits.masked_fill_(~key_is_there(lengths, k.shape[1])[:, None, None], float("-inf"))
    p = logits.softmax(-1).nan_to_num(0.0)
    z = reference.attention_kept(seed, shape, dropout_p) / (1 - dropout_p) if dropout_p else torch.ones_like(p)
    used = (p * z).to(dtype).float()
    out = torch.einsum("bhqk,bkhd->bqhd", used, v).to(dtype)
    dp = torch.einsum("bqhd,bkhd->bhqk", grad, v) * z
    ds = (p * (dp - (grad * out.float()).sum(-1).transpose(1, 2)[..., None])).to(dtype).float()
    dq, dk = scale * torch.einsum("bhqk,bkhd->bqhd", ds, k), scale * torch.einsum("bhqk,bqhd->bkhd", ds, q)
    dv = torch.einsum("bhqk,bqhd->bkhd", used, grad)
    return out.flatten(2), dq.to(dtype), dk.to(dtype), dv.to(dtype)


def against_formula(q, k, v, grad, forward, backward, **extras):
    """Both directions against the formula in fp64, with stock attention's error as the yardstick."""
    dtype, scale = q.dtype, q.shape[-1] ** -0.5
    extras = Extras(**extras)
    clean = [t.nan_to_num(0.0) for t in (q, k, v)]
    ref, ref_lse = attention_formula(*(t.double() for t in clean), scale, extras)
    ref_grads = attention_formula_backward(
        *(t.double() for t in (grad, *clean, ref)), ref_lse, scale, extras
    )  # fmt: skip
    low, *low_grads = rounded(*clean, grad, scale, *extras)
    out, lse = attention.forward(q, k, v, scale, extras, config=FORWARD[forward])
    grads = attention.backward(grad, q, k, v, out, lse, scale, extras, config=BACKWARD[backward])
    judge(out, ref, low, what="out")
    torch.testing.assert_close(lse.double(), ref_lse, rtol=2e-6, atol=2e-3 if dtype is torch.float16 else 2e-6)
    for name, *three in zip(("dq", "dk", "dv"), grads, ref_grads, low_grads, strict=True):
        judge(*three, grad=True, what=name)
    return out, lse, grads


@product(D=(64, 72), dtype=DTYPES, **pairs_of_kernels)
def test_dropout_draws_another_mask_in_the_backward(D, forward, backward, dtype, device):
    seed = torch.tensor([(1 << 62) + 12345], device=device)
    against_formula(*tensors(2, 37, 53, 2, D, dtype, device), forward, backward, dropout_p=0.3, seed=seed)


def test_dropout_has_another_rate_or_repeats_itself():
    """The share of what stays, and that of pairs: between queries, keys, heads, images, seeds."""
    rate, shape = 0.3, (4, 4, 64, 64)
    kept = [reference.attention_kept(torch.tensor([seed]), shape, rate) for seed in (0, 1, 1 << 32)]
    keep, n = 1 - rate, kept[0].numel()
    for mask in kept:
        assert abs(mask.float().mean() - keep) < 5 * (keep * rate / n) ** 0.5
    one = kept[0]
    others = [one.roll(1, dim) for dim in range(4)] + [one.transpose(2, 3), *kept[1:]]
    for other in others:
        both = (one & other).float().mean()
        assert abs(both - keep * keep) < 5 * (keep**2 * (1 - keep**2) / n) ** 0.5


@product(D=(64, 80), dtype=DTYPES, **pairs_of_kernels)
def test_padding_takes_part_or_an_image_without_keys_is_nan(D, forward, backward, dtype, device):
    q, k, v, grad = tensors(4, 21, 53, 2, D, dtype, device)
    lengths = torch.tensor([0, 53, 16, 7], dtype=torch.int32, device=device)
    for image, n in enumerate(lengths.tolist()):
        k[image, n:], v[image, n:] = float("nan"), float("nan")
    out, lse, grads = against_formula(q, k, v, grad, forward, backward, lengths=lengths)
    assert not out[0].any() and torch.equal(lse[0], torch.full_like(lse[0], float("-inf")))
    assert not any(g[0].any() for g in grads)
    assert not grads[1][3, 7:].any() and not grads[2][3, 7:].any()


@every_dtype
@pytest.mark.parametrize("D", (64, 72))
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_packed_image_sees_its_neighbour(cross, D, dtype, device):
    at_q = [0, 17, 17, 82, 83]
    at_k = [0, 5, 70, 70, 101] if cross else at_q
    q, k, v = (draw(n, 2, D, dtype=dtype, device=device, seed=i) for i, n in enumerate((83, at_k[-1], at_k[-1])))
    grad = draw(83, 2 * D, dtype=dtype, device=device, seed=5)
    starts = [torch.tensor(at, dtype=torch.int32, device=device) for at in (at_q, at_k)]
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    out, lse = ops.attention_varlen(*leaves, *starts, return_lse=True)
    grads = torch.autograd.grad(out, leaves, grad)
    for image in range(4):
        rows, keys = slice(*at_q[image : image + 2]), slice(*at_k[image : image + 2])
        if rows.start == rows.stop:
            continue
        if keys.start == keys.stop:
            assert not out[rows].any() and (lse[:, rows] == float("-inf")).all() and not grads[0][rows].any()
            continue
        alone = [t[None, part].clone().requires_grad_() for t, part in zip((q, k, v), (rows, keys, keys), strict=True)]
        exact = [t.detach().double().requires_grad_() for t in alone]
        ref = reference.attention(*exact, D**-0.5)
        low = stock(*alone, D**-0.5, grad[None, rows])
        refs = (ref.detach(), *torch.autograd.grad(ref, exact, grad[None, rows].double()))
        found = (out[rows], grads[0][rows], grads[1][keys], grads[2][keys])
        queries, others = rows.stop - rows.start, keys.stop - keys.start
        for i, (got, *beside) in enumerate(zip(found, refs, low, strict=True)):
            what = f"image {image}, result {i}"
            judge(got.detach()[None], *beside, grad=i > 0, what=what, rows=min(queries, others), keys=others)


def test_indices_with_gaps_between_them_are_misread(device):
    """Lengths and starts that are columns of a table, or one number for all images."""
    q, k, v = (draw(3, 20, 2, 16, device=device, seed=i) for i in range(3))
    lengths = torch.tensor([4, 20, 9], dtype=torch.int32, device=device)
    expected = ops.attention(q, k, v, lengths=lengths)
    table = torch.stack([lengths, lengths * 0 + 1], dim=1)
    assert torch.equal(ops.attention(q, k, v, lengths=table[:, 0]), expected)
    same = torch.tensor([7], dtype=torch.int32, device=device)
    assert torch.equal(ops.attention(q, k, v, lengths=same.expand(3)), ops.attention(q, k, v, lengths=same.repeat(3)))
    packed = [t.flatten(0, 1) for t in (q, k, v)]
    starts = torch.tensor([0, 5, 60], dtype=torch.int32, device=device)
    table = torch.stack([starts, starts + 1], dim=1)
    got = ops.attention_varlen(*packed, table[:, 0])
    assert torch.equal(got, ops.attention_varlen(*packed, starts))


def test_rows_behind_the_last_packed_image_are_garbage(device):
    """A sequence padded to a fixed length: zeros there, in the gradients too, and an lse that is none."""
    starts = torch.tensor([0, 5, 17], dtype=torch.int32, device=device)
    q, k, v = (draw(1, 23, 2, 16, device=device, seed=i) for i in range(3))
    out, lse = attention.forward(q, k, v, 0.25, starts=Starts(starts, starts, 12, 12))
    grad = draw(1, 23, 32, device=device, seed=4)
    grads = attention.backward(grad, q, k, v, out, lse, 0.25, starts=Starts(starts, starts, 12, 12))
    short = [t[:, :17] for t in (q, k, v)]
    near = attention.forward(*short, 0.25, starts=Starts(starts, starts, 12, 12))
    assert torch.equal(out[:, :17], near[0]) and torch.equal(lse[..., :17], near[1])
    assert not out[:, 17:].any() and (lse[..., 17:] == float("-inf")).all()
    assert not any(g[:, 17:].any() for g in grads)
    with pytest.raises(ValueError, match="max_seqlen_q must be at least 1"):
        ops.attention_varlen(q[0, :17], k[0, :17], v[0, :17], starts, None, 0, 12)


def test_op_runs_something_else(monkeypatch, device):
    launches = Launches(monkeypatch, attention)
    qkv = draw(2, 37, 3, 2, 64, device=device).requires_grad_()
    out = ops.attention_qkv(qkv)
    assert len(launches.names) == 1
    (grad,) = torch.autograd.grad(out.square().sum(), qkv)
    assert len(launches.names) >= 2
    apart = [t.detach().requires_grad_() for t in qkv.unbind(2)]
    again = ops.attention(*apart)
    assert torch.equal(out, again)
    assert torch.equal(grad, torch.stack(torch.autograd.grad(again.square().sum(), apart), dim=2))
    launches.names.clear()
    ops.attention_qkv(qkv.double())
    assert not launches.names


def test_dropout_ignores_the_generator_or_checkpointing_draws_anew(device):
    qkv = draw(1, 17, 3, 2, 16, device=device).requires_grad_()

    def run(seed, call=lambda f, x: f(x)):
        torch.manual_seed(seed)
        out = call(lambda x: ops.attention_qkv(x, dropout_p=0.4), qkv)
        return out.detach(), *torch.autograd.grad(out.square().sum(), qkv)

    plain, other = run(0), run(1)
    assert not torch.equal(plain[0], other[0])
    for again in (run(0), run(0, lambda f, x: checkpoint(f, x, use_reentrant=False))):
        assert all(map(torch.equal, plain, again))
    with torch.no_grad():
        mean = torch.stack([ops.attention_qkv(qkv, dropout_p=0.4) for _ in range(30)]).mean(0)
        whole = ops.attention_qkv(qkv)
    # a single one differs by some 0.8 of it, and a scale forgotten by 0.4
    assert (mean - whole).norm() < 0.25 * whole.norm()


@pytest.mark.parametrize("extras", [{}, {"dropout_p": 0.2}, {"lengths": [3, 9]}], ids=["plain", "dropout", "lengths"])
def test_torch_sees_another_op_than_there_is(extras, device):
    q, k, v = (draw(2, n, 2, 16, device=device, seed=n).requires_grad_() for n in (5, 9, 9))
    lengths = torch.tensor(extras["lengths"], dtype=torch.int32, device=device) if "lengths" in extras else None
    p = extras.get("dropout_p", 0.0)
    seed = torch.tensor([5], device=device) if p else None
    torch.library.opcheck(torch.ops.vitfast.attention.default, (q, k, v, 0.25, lengths, p, seed))
    qkv = draw(2, 5, 3, 2, 16, device=device).requires_grad_()
    args = (qkv, 0.25, lengths.clamp(max=5) if lengths is not None else None, p, seed)
    torch.library.opcheck(torch.ops.vitfast.attention_qkv.default, args)
    if lengths is None:
        starts = torch.tensor([0, 2, 5], dtype=torch.int32, device=device)
        packed = [draw(5, 2, 16, device=device, seed=i).requires_grad_() for i in range(3)]
        args = (*packed, starts, starts, 3, 3, 0.25, p, seed)
        torch.library.opcheck(torch.ops.vitfast.attention_varlen.default, args)


def test_map_of_the_class_token_is_not_what_attention_used(device):
    q, k, v = (draw(2, 37, 3, 64, device=device, seed=i) for i in range(3))
    out, lse = ops.attention(q, k, v, return_lse=True)
    weights = ops.attention_weights(q, k, lse)
    assert weights.shape == (2, 3, 37, 37)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2), out, rtol=1e-5, atol=1e-6)
    for heads in (1, slice(0, 2), torch.tensor([2, 0], device=device)):
        chosen = ops.attention_weights(q, k, lse, queries=0, heads=heads)
        torch.testing.assert_close(chosen, weights[:, heads, 0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(ops.attention_weights(q, k, queries=-1), weights[:, :, -1], rtol=1e-5, atol=1e-7)
    with pytest.raises(ValueError, match=r"lse must be \[2, 3, 37\], got \[2, 3\]"):
        ops.attention_weights(q, k, lse[:, :, 0])


MODELS = {"plain": {}, "qk-norm": {"qk_norm": True}, "register tokens": {"reg_tokens": 4, "global_pool": "avg"}}


@pytest.mark.parametrize(
    # the others have all that it has
    "options",
    [pytest.param(how, id=name, marks=[pytest.mark.full] * (not how)) for name, how in MODELS.items()],
)
def test_whole_model_is_another_one_on_kernels(options, monkeypatch, device):
    """Features, loss and every gradient of a small ViT, against the same model without the kernels."""
    import vitfast

    torch.manual_seed(0)
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=48, depth=2, num_classes=10, **options).to(device)
    images = draw(2, 3, 48, 48, device=device)
    launches = Launches(monkeypatch, attention)

    def run():
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor([1, 7], device=device))
        return logits.detach(), *torch.autograd.grad(loss, list(model.parameters()))

    ours = run()
    assert sum("forward" in name for name in launches.names) == 2
    assert sum("backward" in name for name in launches.names) >= 2
    # the package's attribute of this name is the function
    module = importlib.import_module("vitfast.ops.attention")
    monkeypatch.setattr(module, "INTERPRETED", False)
    for attempt in ("attempt_forward", "attempt_backward"):
        monkeypatch.setattr(module, attempt, lambda *_, **__: None)
    for got, expected in zip(ours, run(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_projection_is_copied_or_more_is_kept_than_the_backward_needs(monkeypatch, device):
    """The kernels read qkv where it lies and write what the op returns; qkv, out and lse wait for the backward."""
    seen = []
    launch = attention.launch
    monkeypatch.setattr(attention, "launch", lambda *given, **more: (seen.append(given[2]), launch(*given, **more)))
    saved = []
    qkv = draw(2, 37, 3, 2, 64, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out, lse = ops.attention_qkv(qkv, return_lse=True)
    (grad,) = torch.autograd.grad(out, qkv, draw(*out.shape, device=device, seed=1))
    places = [t.data_ptr() for t in (qkv, qkv[:, :, 1], qkv[:, :, 2], out, lse)]
    # keys and values once more, for the second parts of rows
    assert list(dict.fromkeys(t.data_ptr() for t in seen[0]))[:5] == places
    assert {t.untyped_storage().data_ptr() for t in saved} == {places[0], *places[3:]}
    assert len(seen) >= 2 and all(tensors[0].data_ptr() == places[0] for tensors in seen)
    assert grad.is_contiguous() and grad.shape == qkv.shape


@pytest.mark.parametrize("extras", [{}, {"dropout_p": 0.3}], ids=["plain", "dropout"])
def test_compiled_graph_with_two_calls_computes_something_else(extras, device):
    """One graph, in autocast too, that has the op twice with shared tensors; gradients add up."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float16

    def both(q, k, v):
        first = ops.attention(q, k, v, **extras)
        return first + ops.attention(first.view(q.shape), k, q, **extras)

    leaves = [draw(2, 17, 2, 16, device=device, seed=i).requires_grad_() for i in range(3)]
    cotangent = draw(2, 17, 32, device=device, seed=9)

    def run(function, autocast):
        torch.manual_seed(3)
        with torch.autocast(device.type, dtype, enabled=autocast):
            out = function(*leaves)
        return out, *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))

    for autocast in (False, True):
        torch._dynamo.reset()
        eager, compiled = (run(f, autocast) for f in (both, torch.compile(both, fullgraph=True, backend="aot_eager")))
        assert eager[0].dtype is (dtype if autocast else torch.float32)
        assert all(map(torch.equal, compiled, eager))


def test_exported_attention_computes_something_else(device):
    class Attention(torch.nn.Module):
        def forward(self, qkv):
            return ops.attention_qkv(qkv)

    qkv = draw(2, 17, 3, 2, 16, device=device)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Attention(), (qkv,), dynamic_shapes=({0: batch},))
    more = draw(5, 17, 3, 2, 16, device=device)
    assert torch.equal(program.module()(more), ops.attention_qkv(more))


@pytest.mark.skipif(not INTERPRETED, reason="bf16 is right on a GPU")
def test_interpreter_computes_bf16():
    assert "interpreter" in attention.why_not(torch.device("cpu"), torch.bfloat16, 64, True)[0]


@pytest.mark.parametrize("how", ["padded", "packed"])
def test_gradient_as_a_graph_draws_another_mask_or_sees_padding(how, device, monkeypatch):
    """With `create_graph` a backward is stock operators: the kernel's draws, lengths and packed images again."""
    q, k, v, grad = tensors(3, 21, 21, 2, 16, torch.float32, device)
    extras = {"dropout_p": 0.3}
    if how == "packed":
        starts = torch.tensor([0, 5, 5, 63], dtype=torch.int32, device=device)
        q, k, v, grad = (t.flatten(0, 1) for t in (q, k, v, grad))
        run = lambda *qkv: ops.attention_varlen(*qkv, starts, **extras)  # noqa: E731
    else:
        extras["lengths"] = torch.tensor([0, 21, 7], dtype=torch.int32, device=device)
        k[2, 7:], v[2, 7:] = float("nan"), float("nan")
        run = lambda *qkv: ops.attention(*qkv, **extras)  # noqa: E731
    leaves = [t.requires_grad_() for t in (q, k, v)]
    launches = Launches(monkeypatch, attention)
    out = run(*leaves)
    assert launches.names
    by_kernel = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    launches.names.clear()
    as_graph = torch.autograd.grad(out, leaves, grad, create_graph=True)
    assert not launches.names
    for one, other in zip(by_kernel, as_graph, strict=True):
        assert other.requires_grad
        torch.testing.assert_close(other.detach(), one, rtol=1e-4, atol=1e-5)


FORMS = {
    "plain": {},
    "lengths": {"lengths": [53, 9]},
    "dropout": {"dropout_p": 0.3},
    "packed": {},
}  # fmt: skip


@product(
    D=(64, 72), form=tuple(FORMS), backward=tuple(BACKWARD), dtype=DTYPES,
    allowed=lambda case: case["form"] != "packed" or case["backward"] == "blocks",
)  # fmt: skip
def test_key_of_weight_zero_gets_gradients_of_nan(D, form, backward, dtype, device):
    """Its logits are -inf for all queries, of which the last tile is not full: 0 times -inf would be of no query.

    dq is 0 times -inf in that channel, as stock's is.
    """
    q, k, v, grad = tensors(2, 37, 53, 2, D, dtype, device)
    q[..., 3] = q[..., 3].abs() + 1
    k[0, 5, 0, 3] = k[1, 7, 1, 3] = float("-inf")
    extras = {name: torch.tensor(n, dtype=torch.int32, device=device) if name == "lengths" else n
              for name, n in FORMS[form].items()}  # fmt: skip
    seed = torch.tensor([3], device=device)
    if form == "dropout":
        extras["seed"] = seed
    scale = D**-0.5
    extras = Extras(**extras)
    if form == "packed":
        starts = [torch.tensor([0, n, 2 * n], dtype=torch.int32, device=device) for n in (37, 53)]
        rows = [t.flatten(0, 1)[None] for t in (q, k, v)]
        out, lse = attention.forward(*rows, scale, starts=Starts(*starts, 37, 53))
        grads = attention.backward(grad.flatten(0, 1)[None], *rows, out, lse, scale, starts=Starts(*starts, 37, 53))
        grads = [g.unflatten(1, (2, -1))[0] for g in grads]
    else:
        out, lse = attention.forward(q, k, v, scale, extras, config=FORWARD["online"])
        grads = attention.backward(grad, q, k, v, out, lse, scale, extras, config=BACKWARD[backward])
    wide = [t.double() for t in (q, k, v)]
    ref, ref_lse = attention_formula(*wide, scale, extras)
    refs = attention_formula_backward(grad.double(), *wide, ref, ref_lse, scale, extras)
    assert out.isfinite().all() and lse.isfinite().all() and refs[1].isfinite().all() and refs[2].isfinite().all()
    for name, got, true in zip(("dq", "dk", "dv"), grads, refs, strict=True):
        assert torch.equal(got.isnan(), true.isnan()) and not got.isinf().any(), name
        near = 1e-5 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(got.double(), true, rtol=near, atol=near, equal_nan=True)
    for g in grads[1:]:
        assert not g[0, 5, 0].any() and not g[1, 7, 1].any()


@pytest.mark.parametrize("kind", (torch.float32, torch.bool), ids=str)
def test_key_that_a_mask_takes_from_all_queries_gets_gradients(kind, device):
    q, k, v, grad = tensors(2, 37, 53, 2, 64, torch.float32, device)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    there = torch.arange(53, device=device) % 5 != 2
    mask = there if kind is torch.bool else torch.zeros(53, device=device).masked_fill(~there, float("-inf"))
    out = ops.attention(*leaves, mask=mask.expand(37, -1))
    dq, dk, dv = torch.autograd.grad(out, leaves, grad)
    assert dq.isfinite().all() and not dk[:, ~there].any() and not dv[:, ~there].any()
    assert (dk[:, there] != 0).any(-1).all() and (dv[:, there] != 0).any(-1).all()
