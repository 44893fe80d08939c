"""Plans of ops: the second call on tensors of one layout does what the first did, to the bit, and nothing else."""

import ctypes
import gc
import weakref

import pytest
import torch
from attention_cases import DTYPES
from pairwise import product
from torch.nn.functional import layer_norm

import vitfast
from vitfast import ops
from vitfast.choose import config_tables, dispatch
from vitfast.choose.config_tables import Product
from vitfast.kernels import plans
from vitfast.kernels.triton import launch, linear
from vitfast.ops.linear_folded import added_linear, folded_linear

B, N, D, F, H = 2, 5, 64, 128, 2


@pytest.fixture
def stock_products():
    """None of another mode's, within which nothing is planned."""


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Of plans only, which do nothing else to it."""

    def poisoned(*how, **named):
        return make(*how, **named).fill_(float("nan"))

    make = torch.empty_strided
    monkeypatch.setattr(torch, "empty_strided", poisoned)


class Draw:
    """Tensors of the same layouts with other numbers in them, each time it is made."""

    def __init__(self, seed, dtype, device):
        self.generator, self.how = torch.Generator().manual_seed(seed), {"dtype": dtype, "device": device}

    def __call__(self, *shape, dtype=None):
        return torch.randn(shape, generator=self.generator).to(**self.how).to(dtype or self.how["dtype"])

    def rows(self):
        return self(B, N, D)

    def layer(self, D, K):
        return self(D, K) / K**0.5, self(D)


def folded(draw, act="gelu"):
    weight, bias = draw.layer(F, D)
    return folded_linear(draw.rows(), weight, weight.float().sum(1), bias.float(), bias, None, 1e-6, "layer", act)


def chain(draw):
    x, residual = draw.rows(), draw.rows()
    total, pieces = added_linear(x, *draw.layer(D, D), residual)
    weight, bias = draw.layer(F, D)
    sums = weight.float().sum(1)
    return total, folded_linear(total, weight, sums, bias.float(), bias, pieces, 1e-6, "layer", "none")


def fewer(draw):
    """Rows at a distance, of a larger tensor, and one that begins elsewhere."""
    wide, x = draw(B, N, 2 * D), draw(B, N + 1, D)
    return ops.linear(wide[..., :D], *draw.layer(D, D), residual=x[:, 1:]), ops.linear(wide[..., D:], *draw.layer(D, D))


def norms(draw):
    total, normed = ops.add_layer_norm(draw.rows(), draw.rows(), draw(D), draw(D), 1e-6, gamma=draw(D))
    return total, normed, ops.layer_norm(draw.rows(), draw(D), draw(D), 1e-6)


def attention(draw):
    qkv = draw(B, N, 3, H, D // H)
    out, lse = ops.attention(*qkv.unbind(2), return_lse=True)
    return out, lse, ops.attention_qkv(qkv), ops.attention(draw(B, 1, H, D // H), *draw(B, N, 2, H, D // H).unbind(2))


CALLS = {
    "folded": folded, "statistics": chain, "rows at a distance": fewer, "norms": norms, "attention": attention,
    "linear": lambda draw: ops.linear(
        draw.rows(), *draw.layer(F, D), norm="layer", norm_weight=draw(D), norm_bias=draw(D), act="gelu"
    ),
    "residual": lambda draw: ops.linear(draw.rows(), *draw.layer(D, D), gamma=draw(D), residual=draw.rows()),
    "mlp": lambda draw: ops.mlp(draw.rows(), draw(D), draw(D), *draw.layer(F, D), *draw.layer(D, F), gamma=draw(D)),
    "gated": lambda draw: ops.mlp(
        draw.rows(), draw(D), None, *draw.layer(2 * F, D), *draw.layer(D, F), gated=True, act="silu", norm="rms"
    ),
}  # fmt: skip


def tensors(made):
    return (made,) if isinstance(made, torch.Tensor) else made


def made_plans():
    return [plan for each in plans._made for plan in each.plans.values()]


@pytest.fixture(params=("tiles", "split", "blas"))
def config(request, monkeypatch):
    """What multiplies, chosen as for a device that is not there."""
    found = {
        "tiles": Product("tiles", 16, 32, 32, descriptors=True), "split": Product("tiles", 16, 32, 16, split=2),
        "blas": config_tables.BLAS,
    }[request.param]  # fmt: skip
    monkeypatch.setattr(linear, "config_for", lambda *asked, **how: found)
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 64)
    monkeypatch.setattr(config_tables, "product_config", lambda *asked: Product("tiles", 16, 32, 32))


@product(call=tuple(CALLS), dtype=DTYPES)
def test_a_plan_does_something_else_than_the_call(call, dtype, config, device):
    first = None
    with torch.no_grad():
        for seed in range(3):
            made = tensors(CALLS[call](Draw(seed, dtype, device)))
            assert None not in made_plans() and made_plans()
            first = first or {id(plan) for plan in made_plans()}
            with dispatch.watching():
                alone = tensors(CALLS[call](Draw(seed, dtype, device)))
            for planned, each in zip(made, alone, strict=True):
                assert planned.stride() == each.stride() and torch.equal(planned, each), seed
    # none failed and was made anew
    assert first == {id(plan) for plan in made_plans()}


@product(call=("linear", "residual", "mlp", "gated", "norms", "attention", "rows at a distance"), dtype=DTYPES)
def test_a_plan_of_a_backward_does_something_else(call, dtype, config, device):
    def grads(seed):
        draw, leaves = Draw(seed, dtype, device), []

        class Leaves(Draw):
            def __call__(self, *shape, **how):
                leaves.append(super().__call__(*shape, **how).requires_grad_())
                return leaves[-1]

        made = [t for t in tensors(CALLS[call](Leaves(seed, dtype, device))) if t.requires_grad]
        return torch.autograd.grad(made, leaves, [draw(*t.shape) for t in made], allow_unused=True)

    for seed in range(3):
        made = grads(seed)
        assert None not in made_plans() and made_plans()
        with dispatch.watching():
            alone = grads(seed)
        for planned, each in zip(made, alone, strict=True):
            assert (planned is None and each is None) or torch.equal(planned, each), seed


def test_a_plan_is_followed_for_another_layout(config, device):
    """Of the same shapes: rows at a distance, columns first, a beginning between multiples of 16 bytes, a dtype."""
    draw = Draw(0, torch.float16, device)
    (weight, bias), flat = draw.layer(D, D), draw(B * N * D + 8)
    layouts = [
        draw(B, N, D), draw(B, N, 2 * D)[..., :D], draw(B, D, N).transpose(1, 2), flat[1 : B * N * D + 1].view(B, N, D),
        draw(1, N, D).expand(B, -1, -1),
    ]  # fmt: skip
    layout = lambda *tensors: tuple((t.stride(), t.dtype, t.data_ptr() & 15) for t in tensors)  # noqa: E731
    seen = set()
    with torch.no_grad():
        for x in [*layouts, *layouts]:
            for w in (weight, weight.t().contiguous().t()):
                made = ops.linear(x, w, bias, residual=x), ops.layer_norm(x, bias, bias, 1e-6)
                seen |= {layout(x, w, w), layout(x)}
                with dispatch.watching():
                    wanted = ops.linear(x, w, bias, residual=x), ops.layer_norm(x, bias, bias, 1e-6)
                for planned, each in zip(made, wanted, strict=True):
                    assert planned.stride() == each.stride() and torch.equal(planned, each)
            wide = x.float()
            for rows, gain in ((wide, wide[0, 0]), (x, wide[0, 0])):
                assert ops.layer_norm(rows, gain, gain, 1e-6).dtype is rows.dtype
                seen.add(layout(rows, gain))
    # what the interpreter does not tell apart compilers do
    assert len(made_plans()) == len(seen)


def test_what_no_step_reads_is_made_again(device, monkeypatch):
    """A residual that has to be copied is copied once, however often a launcher asked for its rows."""
    found = Product("tiles", 16, 32, 32, descriptors=True)
    monkeypatch.setattr(linear, "config_for", lambda *asked, **how: found)
    draw = Draw(0, torch.float16, device)
    x, residual, (weight, bias) = draw.rows(), draw(B, N + 2, D)[:, 1:-1], draw.layer(D, D)
    with torch.no_grad():
        wanted = ops.linear(x, weight, bias, residual=residual)
        (plan,) = made_plans()
        others = [step for step in plan.steps if step.named is not None and step.run is not torch.empty_strided]
        assert len(others) == 1
        assert torch.equal(ops.linear(x, weight, bias, residual=residual), wanted)


def test_a_list_of_one_is_taken_for_a_tensor():
    call = plans.Plans(lambda x: x.unbind(0)[0].clone())
    for i in range(3):
        assert call(torch.full((1, 3), float(i))).tolist() == [i] * 3
    assert None not in call.plans.values() and len(call.plans) == 1


def test_two_arguments_that_were_one_tensor_are_read_as_one(config, device):
    """Of x + linear(x) the plan holds for any residual."""
    draw = Draw(0, torch.float16, device)
    x, other, (weight, bias) = draw(B, N, D), draw(B, N, D), draw.layer(D, D)
    with torch.no_grad():
        for residual in (x, other, x):
            made = ops.linear(x, weight, bias, residual=residual)
            with dispatch.watching():
                assert torch.equal(made, ops.linear(x, weight, bias, residual=residual))


def test_a_plan_computes_as_another_precision_said(monkeypatch, device):
    """Of weights that are wider than the rows, which a norm makes as wide."""
    seen, started = [], launch.launch

    def launched(kernel, grid, tensors, numbers, constants, *rest, **more):
        seen.append(constants["PRECISION"])
        started(kernel, grid, tensors, numbers, constants, *rest, **more)

    monkeypatch.setattr(linear, "config_for", lambda *asked, **how: Product("tiles", 16, 32, 32))
    monkeypatch.setattr(linear, "launch", launched)
    draw = Draw(0, torch.float32, device)
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high", "highest"):
            torch.set_float32_matmul_precision(precision)
            ops.linear(draw(B, N, D, dtype=torch.float16), *draw.layer(D, D), norm="layer")
    finally:
        torch.set_float32_matmul_precision(before)
    # the third follows the first's plan
    assert seen == ["ieee", "tf32"]


def test_counters_of_a_plan_that_failed_are_used_again(monkeypatch, device):
    """By the call that is made again: a kernel may have left anything in them."""
    monkeypatch.setattr(linear, "config_for", lambda *asked, **how: Product("tiles", 16, 32, 16, split=2))
    monkeypatch.setattr(linear, "multiprocessors", lambda device: 64)
    draw = Draw(0, torch.float16, device)
    x, residual, (weight, bias) = draw.rows(), draw.rows(), draw.layer(D, D)

    def call():
        return ops.linear(x, weight, bias, residual=residual)

    with torch.no_grad():
        wanted = call()
        (plan,) = made_plans()
        assert plan.drops
        plan.steps = [step._replace(run=dirty(step.run)) if step.named is None else step for step in plan.steps]
        assert torch.equal(call(), wanted)


def dirty(start):
    """A kernel that fails behind its first program."""

    def run(tensors):
        (counters,) = (t for t in tensors if t.dtype is torch.int32)
        counters.fill_(1)
        raise RuntimeError("no")

    return run


def test_a_plan_outlives_what_it_was_made_of(device):
    """A plan holds no tensor: neither what it was first called on nor what came out."""
    x = torch.randn(2, 5, 64, device=device)
    made = ops.layer_norm(x, None, None, 1e-6)
    alive = [weakref.ref(t) for t in (x, made)]
    assert made_plans()
    del x, made
    gc.collect()
    assert [each() for each in alive] == [None, None]


def test_a_plan_is_used_after_the_choice_has_changed(device, monkeypatch):
    x = torch.randn(2, 5, 64, device=device, dtype=torch.float16)
    seen, followed, call = [], [], plans.Plan.__call__
    monkeypatch.setattr(plans.Plan, "__call__", lambda *given: followed.append(backend) or call(*given))
    for backend in ("kernel", "stock", "kernel"):
        with vitfast.backend(backend, op="layer_norm"):
            for _ in range(2):
                seen.append(ops.layer_norm(x, None, None, 1e-6))
    # a choice that holds again has its plans again
    assert followed == ["kernel"] * 3
    torch.testing.assert_close(seen[0], layer_norm(x, (64,)))


def test_what_nobody_saw_written_is_planned():
    """A kernel that is started by other means than Triton's launcher: the plan would leave memory as it was."""

    def by_other_means(x):
        out = torch.empty_like(x)
        ctypes.memmove(out.data_ptr(), x.data_ptr(), x.nbytes)
        return out.view(-1)

    call = plans.Plans(by_other_means)
    for seed in range(3):
        x = torch.full((2, 3), float(seed))
        assert torch.equal(call(x), x.view(-1))
    assert list(call.plans.values()) == [None]


def test_a_number_that_is_read_back_is_that_of_the_first_call():
    call = plans.Plans(lambda x: torch.zeros(2).fill_(x.sum().item()))
    assert [call(torch.full((3,), float(i)))[0].item() for i in range(3)] == [0.0, 3.0, 6.0]
    assert list(call.plans.values()) == [None]


def test_a_tensor_from_elsewhere_is_kept_in_a_plan():
    """One that is asked for anew each time may be another one; any other keeps the call from being planned."""
    kept = [torch.full((2,), 1.0)]
    asked = plans.Plans(lambda x: torch.zeros(2).add_(plans.supplied(lambda: kept[0], kept.clear)).add_(x))
    taken = plans.Plans(lambda x: torch.zeros(2).add_(kept[0]).add_(x))
    for i in range(3):
        kept[0] = torch.full((2,), float(i))
        assert asked(torch.ones(2)).tolist() == taken(torch.ones(2)).tolist() == [i + 1.0] * 2
    assert None not in asked.plans.values() and list(taken.plans.values()) == [None]


def test_what_is_changed_in_a_list_is_left_out():
    """An operator whose tensors are all in a list, and which returns none."""

    def run(x):
        made = torch.zeros_like(x)
        torch._foreach_copy_([made], [x])
        return made

    call = plans.Plans(run)
    for i in range(3):
        assert call(torch.full((2,), float(i))).tolist() == [i, i]


def test_a_plan_keeps_memory_that_nobody_reads_any_more(monkeypatch):
    """What two kernels write one after the other is there one after the other."""
    made, alive = [], []

    def counted(*how, **named):
        alive.append(sum(each() is not None for each in made))
        t = torch.empty(4)
        made.append(weakref.ref(t))
        return t

    def kernel(tensors):
        tensors[0].fill_(1.0)

    def run(x):
        for _ in range(3):
            out = torch.empty(4)
            with plans.unwatched():
                kernel([out])
            if (seen := plans.recorder()) is not None:
                seen.started(kernel, [out])
        return out

    monkeypatch.setattr(torch, "empty_strided", counted)
    call = plans.Plans(run)
    call(torch.ones(1))
    assert call(torch.ones(1)).tolist() == [1.0] * 4 and alive == [0, 0, 0]


def test_a_call_that_is_watched_keeps_what_it_made(monkeypatch):
    """Memory that the call itself gives back while it runs: there may be no more of it."""
    alive = []

    def run(x):
        made = []
        for _ in range(3):
            out = torch.zeros(4)
            made.append(weakref.ref(out))
            out = out.add_(x).view(2, 2)
        alive.append(sum(each() is not None for each in made))
        return out

    call, x = plans.Plans(run), torch.ones(1)
    run(x)
    assert call(x).tolist() == call(x).tolist() == [[1.0] * 2] * 2
    assert alive == [1, 1] and None not in call.plans.values()


def test_a_tensor_from_elsewhere_is_taken_for_one_that_is_gone():
    """Python gives an id again."""
    numbers, ids = iter(range(3)), []

    def run(x):
        gone, number = [torch.zeros(2) for _ in range(100)], float(next(numbers))
        gone = {id(each) for each in gone}
        with plans.unwatched():
            others = [torch.full((2,), number) for _ in range(100)]
        other = next((each for each in others if id(each) in gone), others[0])
        ids.append(id(other) in gone)
        return torch.zeros(2).add_(other)

    call = plans.Plans(run)
    assert [call(torch.ones(1)).tolist() for _ in range(3)] == [[float(i)] * 2 for i in range(3)]
    assert ids[0] and list(call.plans.values()) == [None]


def test_memory_is_taken_for_that_of_one_that_is_gone():
    """Addresses are given again."""

    def run(x):
        for _ in range(20):
            out = torch.empty(4).copy_(x.view(4)).add_(x.t().reshape(4))
            x = out.view(2, 2)
        return x

    call, x = plans.Plans(run), torch.arange(4.0).view(2, 2)
    for i in range(3):
        assert torch.equal(call(x + i), run(x + i))
    assert None not in call.plans.values()


def test_a_choice_that_changed_before_the_call_began_is_kept_under_the_one_before(device, monkeypatch):
    """Another thread's: between a plan's key and the call that is watched."""
    x = torch.randn(2, 5, 64, device=device, dtype=torch.float16)
    first = plans.Plans._first

    def later(self, at, args):
        with vitfast.backend("stock", op="layer_norm"):
            return first(self, at, args)

    with monkeypatch.context() as patch:
        patch.setattr(plans.Plans, "_first", later)
        ops.layer_norm(x, None, None, 1e-6)
    assert made_plans() == []


def test_a_kernel_that_fails_in_a_plan_is_not_told(device, monkeypatch):
    """The call is made again the long way, where failures are judged."""
    x = torch.randn(2, 5, 64, device=device)
    wanted = ops.layer_norm(x, None, None, 1e-6)
    (plan,) = made_plans()
    plan.steps = [step._replace(run=fails) if step.named is None else step for step in plan.steps]
    assert torch.equal(ops.layer_norm(x, None, None, 1e-6), wanted)
    assert made_plans() == []
    monkeypatch.setattr(launch, "launch", fails)


def test_memory_of_a_plan_that_failed_is_there_while_the_call_is_made_again():
    made, alive = [], []

    def run(x):
        alive.append(sum(each() is not None for each in made))
        return torch.zeros(4).add_(x)

    def zeros(*how, **named):
        made.append(weakref.ref(t := torch.zeros(4)))
        return t

    call, x = plans.Plans(run), torch.ones(1)
    call(x)
    (plan,) = call.plans.values()
    plan.steps = [step._replace(run=fails if step.places else zeros) for step in plan.steps]
    assert call(x).tolist() == [1.0] * 4
    assert alive == [0, 0] and len(made) == 1


def fails(*_, **named):
    raise RuntimeError("no")
