"""Derivatives of gradients: Hessian-vector products, gradient penalties, inner loops of meta-learning, in fp64."""

import pytest
import torch
from small_models import tiny
from test_reference import VARIANTS, build, draw, every_variant
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast import ops
from vitfast.ops import _higher

SIZE = (3, 4, 2)
RAW = torch.ops.vitfast
STARTS = torch.tensor([0, 2, 5], dtype=torch.int32)
KEY_STARTS = torch.tensor([0, 4, 4], dtype=torch.int32)
LENGTHS, SEED = torch.tensor([3, 0], dtype=torch.int32), torch.tensor([7])
UINT8 = torch.arange(96, dtype=torch.uint8).view(2, 3, 4, 4)
HEADS, KEYS = (2, 3, 2, 4), (2, 5, 2, 4)
MLP_SHAPES = (2, 3, 4), (4,), (6, 4), (6,), (4, 3)


def gated(act, recompute):
    return lambda x, n, w1, b1, w2: ops.mlp(x, n, None, w1, b1, w2, None, act=act, recompute=recompute, gated=True)


def packed(weight, bias, prefix):
    images = [torch.linspace(-1, 1, 24, dtype=torch.float64).view(shape) for shape in ((3, 2, 4), (3, 4, 2))]
    # of the patches only, and of all tokens
    positions = [prefix.repeat(2, 1), prefix.repeat(3, 1)]
    return ops.patch_embed_packed(images, weight, bias, pos_embed=positions, prefix=prefix)[0]


def normalised(weight, bias, pos_embed):
    mean, std = torch.full((3,), 0.5), torch.full((3,), 0.2)
    return ops.patch_embed(UINT8, weight, bias, pos_embed=pos_embed, mean=mean, std=std)


def with_dropout(*qkv):
    torch.manual_seed(3)
    return ops.attention(*qkv, dropout_p=0.4)


# by name: op of tensors, and the shapes of these
OPTIONS = {
    **{
        f"linear {act}": (lambda x, w, b, act=act: ops.linear(x, w, b, act=act), ((2, 3, 4), (5, 4), (5,)))
        for act in ("gelu", "gelu_tanh", "quick_gelu", "silu")
    },
    "linear residual is x": (
        lambda x, w, g: ops.linear(x, w, gamma=g, residual=x, norm="layer"), ((2, 4), (4, 4), (4,)),
    ),
    "mlp gelu none": (gated("gelu", "none"), MLP_SHAPES),
    "mlp gelu_tanh act": (gated("gelu_tanh", "act"), MLP_SHAPES),
    "mlp quick_gelu fc1": (gated("quick_gelu", "fc1"), MLP_SHAPES),
    "attention scale, lse": (
        lambda *qkv: ops.attention(*qkv, scale=0.3, return_lse=True)[0], (HEADS, KEYS, KEYS),
    ),
    "attention dropout": (with_dropout, (HEADS,) * 3),
    # as the kernels for GPUs are called
    "attention lengths, seed": (lambda *qkv: RAW.attention(*qkv, 0.5, LENGTHS, 0.4, SEED)[0], (HEADS, KEYS, KEYS)),
    "attention_qkv seed": (lambda qkv: RAW.attention_qkv(qkv, 0.5, None, 0.4, SEED)[0], ((2, 3, 3, 2, 4),)),
    "attention_varlen": (
        lambda *qkv: ops.attention_varlen(*qkv, STARTS, KEY_STARTS), ((5, 2, 4), (4, 2, 4), (4, 2, 4)),
    ),
    "attention_varlen seed": (
        lambda *qkv: RAW.attention_varlen(*qkv, STARTS, STARTS, 3, 3, 0.5, 0.4, SEED)[0], ((5, 2, 4),) * 3,
    ),
    "patch_embed pad": (
        lambda images, w, b, p: ops.patch_embed(images, w, b, prefix=p, pad=True),
        ((2, 3, 3, 5), (4, 3, 2, 2), (4,), (1, 4)),
    ),
    "patch_embed uint8": (normalised, ((4, 3, 2, 2), (4,), (4, 4))),
    "patch_embed input_norm": (
        lambda images, w, n, m: ops.patch_embed(images, w, input_norm=(n, m, 1e-5)),
        ((2, 3, 4, 4), (4, 2, 2, 3), (12,), (12,)),
    ),
    "patch_embed_packed": (packed, ((4, 3, 2, 2), (4,), (1, 4))),
    "patch_embed_packed images": (
        lambda one, two, w: ops.patch_embed_packed([one, two], w)[0], ((3, 2, 4), (3, 4, 2), (4, 3, 2, 2)),
    ),
}  # fmt: skip


def leaves(*shapes):
    return tuple(draw(*shape).requires_grad_() for shape in shapes)


def check(op, tensors):
    assert torch.autograd.gradcheck(op, tensors, fast_mode=True)
    # gradgradcheck holds gradients with a graph to their own derivative: they must be the gradients, too
    outs = op(*tensors)
    outs = outs if isinstance(outs, tuple) else (outs,)
    plain, as_graph = (
        torch.autograd.grad(outs, tensors, [torch.ones_like(out) for out in outs], retain_graph=True, **how)
        for how in ({}, {"create_graph": True})
    )
    close([g.detach() for g in as_graph], plain, 1e-10)
    assert torch.autograd.gradgradcheck(op, tensors, fast_mode=True)


@every_variant
def test_derivative_of_a_gradient_is_wrong(variant):
    """The backward op's own derivative left out: a Hessian-vector product of half the norm, without an error."""
    name, _, options = VARIANTS[variant]
    tensors = build(variant, SIZE, dtype=torch.float64)
    fixed = {key: t for key, t in tensors.items() if key == "row_scale"}
    names = [key for key in tensors if key not in fixed]
    op = lambda *given: getattr(ops, name)(**dict(zip(names, given, strict=True)), **fixed, **options)  # noqa: E731
    check(op, tuple(tensors[key].requires_grad_() for key in names))


@pytest.mark.parametrize("name", OPTIONS)
def test_option_is_forgotten_in_the_derivative_of_a_gradient(name):
    """Another activation, scale or seed, padding that takes part, a residual counted twice."""
    op, shapes = OPTIONS[name]
    check(op, leaves(*shapes))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if len(VARIANTS[name][1]) > 2])
def test_frozen_input_changes_the_derivative_of_the_others(variant):
    """A gradient in the place of another where some inputs want none."""
    name, _, options = VARIANTS[variant]
    tensors = build(variant, SIZE, dtype=torch.float64)
    for frozen in tensors:
        names = [key for key in tensors if key not in (frozen, "row_scale")]
        given = {key: t.detach() for key, t in tensors.items()}
        op = lambda *moving: getattr(ops, name)(**{**given, **dict(zip(names, moving, strict=True))}, **options)  # noqa: B023, E731
        assert torch.autograd.gradgradcheck(op, tuple(given[key].requires_grad_() for key in names), fast_mode=True)


@pytest.mark.parametrize("extra", ["mask", "lengths"])
def test_derivative_through_stock_attention_is_silently_wrong(extra):
    """Where scaled_dot_product_attention runs: right with its math backend, an error of torch's with the others."""
    q, k, v = leaves(*((2, 3, 2, 4),) * 3)
    extras = {"mask": torch.eye(3, dtype=torch.bool)} if extra == "mask" else {"lengths": torch.tensor([2, 3])}
    op = lambda *qkv: ops.attention(*qkv, **extras)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        check(op, (q, k, v))
    grads = torch.autograd.grad(op(q, k, v).square().sum(), (q, k, v), create_graph=True)
    with pytest.raises(RuntimeError, match="not implemented"):
        torch.autograd.grad(sum(g.sum() for g in grads), (q, k, v))


MODELS = {
    "timm": lambda: tiny(init_values=0.1),
    "registers, swiglu": lambda: tiny("vit_giant_patch14_reg4_dinov2", img_size=28, embed_dim=32, num_heads=2),
    "qk norm, mean": lambda: tiny("test_vit2", qk_norm=True),
    "attention pooling, tanh": lambda: tiny("test_vit3"),
    "quick GELU, pre-norm": lambda: tiny("vit_base_patch16_clip_quickgelu_224", embed_dim=32, num_heads=2),
    "vit-pytorch": lambda: vitfast.ViT(
        image_size=16, patch_size=8, num_classes=10, dim=32, depth=2, heads=2, mlp_dim=64, dim_head=16
    ).eval(),
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_and_images(name):
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    size = model.config.image_size
    return model, draw(2, 3, *size)


def dot(one, other):
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


def by_differences(gradient_at, tensors, direction, step=1e-5):
    """The derivative of a gradient along `direction`, by central differences."""

    def moved(by):
        with torch.no_grad():
            for t, d in zip(tensors, direction, strict=True):
                t.add_(d, alpha=by)
        return gradient_at()

    ahead = moved(step)
    behind = moved(-2 * step)
    moved(step)
    return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]


def close(found, expected, tolerance=1e-6):
    scale = sum(e.square().sum() for e in expected).sqrt()
    assert sum((f - e).square().sum() for f, e in zip(found, expected, strict=True)).sqrt() <= tolerance * scale


@every_model
@pytest.mark.parametrize("train", [False, True])
def test_hessian_vector_product_is_wrong(name, train):
    """Second derivatives of a loss with respect to all parameters and the images; in training with stochastic depth."""
    model, images = model_and_images(name)
    if train:
        for block in model.blocks:
            block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.5
        model.train()
    moving = [*model.parameters(), images.requires_grad_()]
    direction = [torch.randn_like(t) for t in moving]

    def gradient(**how):
        torch.manual_seed(1)
        loss = torch.nn.functional.cross_entropy(model(images), torch.tensor([1, 2]))
        return torch.autograd.grad(loss, moving, **how)

    product = torch.autograd.grad(dot(gradient(create_graph=True), direction), moving)
    close(product, by_differences(gradient, moving, direction))


@every_model
def test_gradient_penalty_trains_nothing(name):
    """R1 and WGAN-GP: the penalty's gradient with respect to the parameters, by `backward`."""
    model, images = model_and_images(name)
    parameters = list(model.parameters())
    images.requires_grad_()

    def penalty():
        (grad,) = torch.autograd.grad(model(images).sum(), images, create_graph=True)
        return grad.square().sum()

    penalty().backward()
    direction = [torch.randn_like(p) for p in parameters]
    values = []
    for by in (1e-5, -2e-5):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)
        values.append(penalty().detach())
    along = dot([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters], direction)
    assert abs((values[0] - values[1]) / 2e-5 - along) <= 1e-5 * abs(along)


@every_model
def test_torch_func_has_other_second_derivatives(name):
    """Reverse over reverse, forward over reverse, reverse over forward, and a plain tangent, of the images."""
    from torch.func import grad, jvp

    model, images = model_and_images(name)
    model.requires_grad_(False)
    f = lambda x: model(x).square().sum()  # noqa: E731
    v = torch.randn_like(images)
    images.requires_grad_()
    expected = by_differences(lambda: [grad(f)(images.detach())], [images], [v])
    close([grad(lambda x: (grad(f)(x) * v).sum())(images.detach())], expected)
    close([jvp(grad(f), (images.detach(),), (v,))[1]], expected)
    close([grad(lambda x: jvp(f, (x,), (v,))[1])(images.detach())], expected)
    close([jvp(f, (images.detach(),), (v,))[1]], [(grad(f)(images.detach()) * v).sum()])
    # torch.func inside, autograd around it
    (found,) = torch.autograd.grad((grad(f)(images) * v).sum(), images)
    close([found], expected)


def test_inner_loop_of_meta_learning_is_cut_off():
    """MAML: the loss after one step of SGD, differentiated with respect to the parameters before it."""
    model, images = model_and_images("timm")
    names, parameters = zip(*model.named_parameters(), strict=True)

    def outer():
        grads = torch.autograd.grad(model(images).square().sum(), parameters, create_graph=True)
        moved = {n: p - 0.01 * g for n, p, g in zip(names, parameters, grads, strict=True)}
        with torch.nn.utils.stateless._reparametrize_module(model, moved):
            return model(images.flip(0)).cos().sum()

    direction = [torch.randn_like(p) for p in parameters]
    along = dot(torch.autograd.grad(outer(), parameters), direction)
    # the loss itself by differences: its slope along the direction
    ahead, behind = [], []
    for sums, by in ((ahead, 1e-5), (behind, -2e-5)):
        with torch.no_grad():
            for p, d in zip(parameters, direction, strict=True):
                p.add_(d, alpha=by)
        sums.append(outer().detach())
    assert abs((ahead[0] - behind[0]) / 2e-5 - along) <= 1e-5 * abs(along)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_second_derivatives(reentrant):
    """Recomputed tensors without their graph; the reentrant kind has no second derivative and says so."""
    model, images = model_and_images("timm")
    images.requires_grad_()

    def penalty(run):
        (grad,) = torch.autograd.grad(run(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.parameters()))

    whole = lambda x: checkpoint(model, x, use_reentrant=reentrant)  # noqa: E731
    if reentrant:
        with pytest.raises(RuntimeError, match="[Cc]heckpoint"):
            penalty(whole)
        return
    expected = penalty(model)
    close(penalty(whole), expected, 1e-12)
    model.set_grad_checkpointing()
    close(penalty(model.train()), expected, 1e-12)


def test_two_ops_of_one_ancestor_count_its_paths_twice():
    """Inputs of an op that are computed from one another: the gradient of one would hold the other's path too."""

    def f(x, weight):
        y = ops.linear(x, weight, residual=x)
        z = ops.linear(y, weight, gamma=x[0, 0], residual=x, norm="layer", act="gelu")
        _, normed = ops.add_layer_norm(z, y, x[0, 0], None, 1e-6, gamma=y[0, 0])
        return ops.attention(*[t.unflatten(-1, (2, 2)) for t in (normed, z, x)])

    check(f, leaves((2, 3, 4), (4, 4)))


def test_third_derivative_is_wrong():
    """A graph that ends after the second."""
    q, k, v = leaves(*((1, 2, 1, 2),) * 3)
    gradient = lambda *t: torch.autograd.grad(ops.attention(*t).pow(3).sum(), t, create_graph=True)  # noqa: E731
    second = lambda *t: torch.autograd.grad(sum(g.pow(2).sum() for g in gradient(*t)), t, create_graph=True)  # noqa: E731
    assert torch.autograd.gradcheck(second, (q, k, v), fast_mode=True)


@pytest.mark.parametrize("variant", ["layer_norm", "add_layer_norm", "linear full", "attention", "attention_qkv", "mlp",
                                     "patch_embed"])  # fmt: skip
def test_batched_gradients_differ_from_one_at_a_time(variant):
    """`is_grads_batched=True`, by which vectorised Jacobians are computed; tangents that are lost on the way back."""
    name, _, options = VARIANTS[variant]
    tensors = build(variant, SIZE, dtype=torch.float64)
    moving = [t.requires_grad_() for key, t in tensors.items() if key != "row_scale"]
    out = getattr(ops, name)(**tensors, **options)
    out = out[1] if isinstance(out, tuple) else out
    cotangents = torch.randn(3, *out.shape, dtype=torch.float64)
    batched = torch.autograd.grad(out, moving, cotangents, is_grads_batched=True, retain_graph=True)
    # and the vmap of torch.func
    mapped = torch.func.vmap(lambda c: torch.autograd.grad(out, moving, c, retain_graph=True))(cotangents)
    for i, one in enumerate(cotangents):
        alone = torch.autograd.grad(out, moving, one, retain_graph=True)
        close([b[i] for b in batched], alone, 1e-12)
        close([m[i] for m in mapped], alone, 1e-12)
        with forward_ad.dual_level():
            dual = torch.autograd.grad(out, moving, forward_ad.make_dual(one, cotangents[0]), retain_graph=True)
            tangents = [forward_ad.unpack_dual(d).tangent for d in dual]
            close(tangents, [b[0] for b in batched], 1e-12)


def test_vectorised_hessian_is_wrong():
    """Batched gradients of gradients."""
    model, images = model_and_images("timm")
    changed = lambda bias: {"head.bias": bias, "norm.weight": bias.repeat(32)[:192]}  # noqa: E731
    f = lambda bias: torch.func.functional_call(model, changed(bias), images)  # noqa: E731
    bias = draw(10)
    hessians = [
        torch.autograd.functional.hessian(lambda b: f(b).square().sum(), bias, vectorize=vectorize)
        for vectorize in (False, True)
    ]
    close([hessians[1]], [hessians[0]], 1e-10)


def test_compiled_model_gives_second_derivatives_that_are_wrong():
    """torch.compile has none, and says so."""
    model, images = model_and_images("timm")
    compiled = torch.compile(model, backend="aot_eager")
    images.requires_grad_()
    (grad,) = torch.autograd.grad(compiled(images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_second_derivatives_in_half_precision_are_far_off():
    """Autocast: casts on the way that cut the graph, logits rounded to bf16, gradients in another dtype."""
    model, images = model_and_images("timm")
    model, images = model.float(), images.float().requires_grad_()

    def product():
        (grad,) = torch.autograd.grad(model(images).square().sum(), images, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), list(model.blocks.parameters()))

    expected = product()
    with torch.autocast("cpu", torch.bfloat16):
        found = product()
    assert all(f.dtype == e.dtype for f, e in zip(found, expected, strict=True))
    close(found, expected, 0.1)


class Calls(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitfast":
            self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("variant", ["layer_norm", "add_layer_norm", "linear full", "attention", "attention_qkv", "mlp",
                                     "patch_embed"])  # fmt: skip
def test_plain_backward_takes_the_slow_way(variant):
    """Every training step with stock operators and a graph, where nobody asked for one."""
    name, _, options = VARIANTS[variant]
    tensors = {key: t.requires_grad_(key != "row_scale") for key, t in build(variant, SIZE).items()}
    calls = Calls()
    calls.seen = []
    out = getattr(ops, name)(**tensors, **options)
    with calls:
        (out[1] if isinstance(out, tuple) else out).sum().backward()
    assert calls.seen == [f"vitfast::{name}_backward"]
    assert not any(t.grad.requires_grad for t in tensors.values() if t.grad is not None)


TENSORS = {variant: [name for name in VARIANTS[variant][1] if name != "row_scale"] for variant in VARIANTS}
TANGENTS = [(variant, name) for variant, names in TENSORS.items() for name in names]


@pytest.mark.parametrize(("variant", "name"), TANGENTS)
def test_tangent_of_one_input_is_lost(variant, name):
    """Forward mode by hand, one tensor at a time, beside the plain derivative."""
    op, _, options = VARIANTS[variant]
    tensors = build(variant, SIZE, dtype=torch.float64)
    direction = torch.randn_like(tensors[name])
    run = lambda t: getattr(ops, op)(**{**tensors, name: t}, **options)  # noqa: E731
    _, expected = torch.autograd.functional.jvp(lambda t: run(t), tensors[name], direction)
    with forward_ad.dual_level():
        found = run(forward_ad.make_dual(tensors[name], direction))
        outs = found if isinstance(found, tuple) else (found,)
        # a result that does not depend on the input has none
        tangents = [torch.zeros_like(out) if t is None else t for out, t in map(forward_ad.unpack_dual, outs)]
    close(tangents, expected if isinstance(expected, tuple) else (expected,), 1e-9)


@every_model
@pytest.mark.parametrize("of", ["images", "parameters"])
def test_tangent_of_a_model_is_lost(name, of):
    """vit-pytorch's rows of pixels were cut by an op that had no rule for tangents, and dropped them."""
    model, images = model_and_images(name)
    moving = dict(model.named_parameters()) if of == "parameters" else {}
    direction = {key: torch.randn_like(p) for key, p in moving.items()}
    along = torch.randn_like(images) if of == "images" else torch.zeros_like(images)

    def loss(images, parameters):
        return torch.func.functional_call(model, parameters, images).square().sum()

    with forward_ad.dual_level():
        duals = {key: forward_ad.make_dual(p.detach(), direction[key]) for key, p in moving.items()}
        found = forward_ad.unpack_dual(loss(forward_ad.make_dual(images, along), duals)).tangent
    images.requires_grad_()
    given = [images, *moving.values()]
    expected = dot(torch.autograd.grad(loss(images, moving), given), [along, *direction.values()])
    close([found], [expected], 1e-9)


RAW_CALLS = {
    "image_rows": lambda t: RAW.image_rows(t, [2, 2], torch.float64, None, None, "chw"),
    "attention": lambda t: RAW.attention(t, t, t, 0.5),
    "layer_norm": lambda t: RAW.layer_norm(t, None, None, 1e-6, "layer", "float64"),
}


@pytest.mark.parametrize("name", RAW_CALLS)
def test_raw_op_drops_a_tangent(name):
    """A call below `vitfast.ops`, which has no rule for it: an error."""
    t = draw(1, 2, 4, 4)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match="jvp|neither gradient"):
        RAW_CALLS[name](forward_ad.make_dual(t, t))
    if name == "image_rows":
        with pytest.raises(NotImplementedError, match="neither gradient"):
            RAW_CALLS[name](t.requires_grad_())


@pytest.mark.parametrize("how", ["attention", "attention_qkv", "attention_varlen", "mask"])
def test_learned_scale_gets_no_gradient(how):
    """A temperature that is trained: ops take numbers, which have none. First and second derivative."""
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)
    calls = {
        "attention": lambda q, scale: ops.attention(q, q, q, scale=scale),
        "attention_qkv": lambda q, scale: ops.attention_qkv(q.unsqueeze(2).repeat(1, 1, 3, 1, 1), scale=scale),
        "attention_varlen": lambda q, scale: ops.attention_varlen(q[0], q[0], q[0], starts, scale=scale),
        "mask": lambda q, scale: ops.attention(q, q, q, scale=scale, mask=torch.ones(6, 6, dtype=torch.bool)),
    }
    with sdpa_kernel(SDPBackend.MATH):
        check(calls[how], (*leaves((2, 6, 2, 4)), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)))
    q = draw(2, 6, 2, 4)
    torch.testing.assert_close(calls[how](q, torch.tensor(0.3, dtype=torch.float64)), calls[how](q, 0.3))
    with pytest.raises(ValueError, match=r"scale must be one number, got \[2\]"):
        calls[how](q, torch.ones(2, dtype=torch.float64))


def test_learned_scale_of_a_model_gets_no_gradient():
    model, images = model_and_images("timm")
    scale = model.blocks[0].attn.scale
    expected = model(images)
    model.blocks[0].attn.scale = torch.nn.Parameter(torch.tensor(scale, dtype=torch.float64))
    torch.testing.assert_close(model(images), expected)
    model(images).sum().backward()
    assert model.blocks[0].attn.scale.grad.abs() > 0


def test_graph_of_gradients_is_computed_under_autocast():
    """Products of what was cast already rounded once more; a result in fp32 beside a gradient in bf16."""
    x = torch.randn(5, 7, requires_grad=True)
    formula = lambda t: t @ t.mT  # noqa: E731
    grad = torch.randn(5, 5)
    (expected,) = _higher.grads(formula, [x], [True], grad)
    with torch.autocast("cpu", torch.bfloat16):
        (found,) = _higher.grads(formula, [x], [True], grad)
    assert torch.equal(found, expected)
    (narrow,) = _higher.grads(formula, [x], [True], grad.bfloat16())
    torch.testing.assert_close(narrow, expected, rtol=0.02, atol=0.05)
