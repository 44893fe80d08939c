"""Calls on a CPU that are faster as stock operators, or as the model's own modules: chosen, and as right as by ops."""

import pytest
import timm_pair
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import vitfast
from vitfast import ops
from vitfast.ops import _on_cpu

pytestmark = pytest.mark.as_users


class Calls(TorchDispatchMode):
    """Names of vitfast's ops that were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vitfast":
            self.names.add(func.__name__.removesuffix(".default"))
        return func(*args, **(kwargs or {}))


def ops_called(call):
    with Calls() as calls:
        call()
    return calls.names


D = 64
WEIGHTS = {"w": (D, D), "w1": (2 * D, D), "w2": (D, 2 * D), "d": (D,)}
# each op of x [1, N, D] and weights
CASES = {
    "layer_norm": lambda x, w: ops.layer_norm(x, w["d"], w["d"], 1e-6),
    "linear": lambda x, w: ops.linear(x, w["w"], w["d"], norm="layer", norm_weight=w["d"], residual=x),
    "mlp": lambda x, w: ops.mlp(x, w["d"], w["d"], w["w1"], None, w["w2"], w["d"]),
    "attention": lambda x, w: ops.attention(*[x.unflatten(-1, (2, -1))] * 3),
    "attention_qkv": lambda x, w: ops.attention_qkv(torch.stack([x.unflatten(-1, (2, -1))] * 3, 2)),
}


def case_of(op, tokens, training, dtype=torch.float32):
    weights = {name: torch.randn(shape, dtype=dtype, requires_grad=training) for name, shape in WEIGHTS.items()}
    x = torch.randn(1, tokens, D, dtype=dtype, requires_grad=training)
    return x, lambda: CASES[op](x, weights)


def tokens_at(op):
    """The most tokens at which stock operators run, None for any number."""
    limit = _on_cpu.LIMITS.get(op, 0)
    return None if limit == _on_cpu.ALWAYS else limit // D


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", CASES)
def test_op_runs_where_stock_operators_are_faster(op, training):
    """And the other way round, one token above the limit."""
    most = tokens_at(op)
    if most != 0:
        assert not ops_called(case_of(op, most or 5, training)[1])
    if most is not None:
        assert ops_called(case_of(op, most + 1, training)[1]) == {op}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", CASES)
def test_compiled_graph_loses_its_op(op, training):
    """A graph serves other sizes too."""
    torch._dynamo.reset()
    call, found = case_of(op, 5, training)[1], []
    compiled = torch.compile(call, backend=lambda graph, _: found.append(graph) or graph, fullgraph=True)
    compiled()
    assert any(f"vitfast.{op}" in str(node.target) for graph in found for node in graph.graph.nodes)


def test_small_call_has_no_lse():
    q = torch.randn(1, 5, 2, 32, requires_grad=True)
    out, lse = ops.attention(q, q, q, return_lse=True)
    assert out.shape == (1, 5, 64) and lse.shape == (1, 2, 5)


@pytest.mark.parametrize("op", CASES)
def test_empty_call_fails(op):
    for training in (False, True):
        assert case_of(op, 0, training)[1]().numel() == 0


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_operators_give_other_numbers(op, dtype, monkeypatch):
    """Result, dtype and every gradient beside the op's, to the rounding of the dtype."""

    def results():
        torch.manual_seed(0)
        x, call = case_of(op, 9, True, dtype)
        out = call()
        out.backward(torch.randn_like(out))
        return [out.detach(), x.grad]

    stock = results()
    monkeypatch.setattr(_on_cpu, "LIMITS", dict.fromkeys(_on_cpu.LIMITS, 0))
    for one, other in zip(stock, results(), strict=True):
        assert one.dtype is other.dtype and one.is_contiguous() == other.is_contiguous()
        atol = 16 * torch.finfo(dtype).eps * other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=0, atol=atol)


@pytest.mark.parametrize("family", timm_pair.FAMILIES)
def test_small_model_is_not_timms(family):
    """Output and gradients of images so small that the modules run, in training and in evaluation."""
    theirs, ours, images = timm_pair.build_pair(family, batch=1, massive=False)
    expected, grads = timm_pair.run(theirs, images)
    found, found_grads = timm_pair.run(ours, images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    for name, grad in grads.items():
        scale = grad.abs().max().item()
        torch.testing.assert_close(found_grads[name], grad, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=name)
    with torch.inference_mode():
        expected = theirs.eval()(images)
        torch.testing.assert_close(ours.eval()(images), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.fixture
def small():
    """timm's model and ours, small enough that modules run, and an image."""
    return timm_pair.pair_of(
        "vit_tiny_patch16_224", 1, False, img_size=32, embed_dim=64, num_heads=2, depth=2, patch_size=8, num_classes=5
    )


def test_small_model_looks_for_ops(small):
    _, ours, image = small
    with torch.inference_mode():
        assert ops_called(lambda: ours.eval()(image)) == {"attention_qkv"}
        assert ops_called(lambda: ours(image.expand(8, -1, -1, -1).repeat(3, 1, 1, 1))) > {"attention_qkv", "mlp"}
    assert ops_called(lambda: ours.train()(image).sum()) == {"attention_qkv"}


def test_small_model_draws_otherwise(small):
    """Dropout of tokens, weights, projections and paths: a seed's draws are timm's."""
    theirs, ours, image = small
    for model in (theirs, ours):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
    for block in ours.blocks:
        block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.0
    expected, grads = timm_pair.run(theirs, image)
    found, found_grads = timm_pair.run(ours, image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert all(torch.allclose(found_grads[name], grad, rtol=1e-3, atol=1e-4) for name, grad in grads.items())


@pytest.mark.parametrize(
    "how", [{}, {"is_causal": True}, {"attn_mask": torch.ones(17, 17).tril().bool()}], ids=["", "causal", "mask"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small_model_is_another_than_by_ops(small, how, dtype, monkeypatch):
    _, ours, image = small

    def results():
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = ours(image, **how)
        out.float().square().sum().backward()
        return out.detach(), [p.grad for p in ours.parameters()]

    out, grads = results()
    monkeypatch.setattr(_on_cpu, "HOST_BOUND", 0)
    monkeypatch.setattr(_on_cpu, "LIMITS", dict.fromkeys(_on_cpu.LIMITS, 0))
    expected, expected_grads = results()
    relative = 1e-4 if dtype is torch.float32 else 5e-2
    for one, other in zip([out, *grads], [expected, *expected_grads], strict=True):
        assert one.dtype is other.dtype
        torch.testing.assert_close(one, other, rtol=relative, atol=relative * other.abs().max().item())


def test_small_model_is_checkpointed_otherwise(small):
    _, ours, image = small
    expected, grads = timm_pair.run(ours, image)
    ours.set_grad_checkpointing(True)
    found, found_grads = timm_pair.run(ours, image)
    assert torch.equal(found, expected) and all(torch.equal(found_grads[name], grads[name]) for name in grads)


def test_hooked_module_is_not_called(small):
    _, ours, image = small
    called = []
    names = [name for name, module in ours.named_modules() if name and "drop" not in name]
    for name in names:
        ours.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    ours(image)
    silent = {"blocks.0.attn.q_norm", "blocks.0.attn.k_norm", "blocks.0.attn.norm"}
    assert not set(names) - set(called) - {s.replace("0", str(i)) for s in silent for i in range(2)}


def test_first_tokens_are_not_all_of_them(small):
    """`keep` of a block whose modules run."""
    _, ours, _ = small
    block, x = ours.eval().blocks[0], torch.randn(2, 17, 64)
    torch.testing.assert_close(block(x, keep=1), block(x)[:, :1], rtol=1e-4, atol=1e-4)


def test_explain_is_silent_about_sizes():
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    notes = " ".join(vitfast.explain(model).notes)
    assert "modules of up to 16,384" in notes and "linear up to 65,536" in notes


@pytest.mark.parametrize("op", CASES)
def test_small_call_has_no_second_derivative(op):
    x, call = case_of(op, 5, True)
    (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    grad.square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_small_model_has_no_second_derivative(small):
    """As of a gradient penalty."""
    _, ours, image = small
    image = image.requires_grad_()
    (grad,) = torch.autograd.grad(ours(image).square().sum(), image, create_graph=True)
    grad.square().sum().backward()
    assert all(p.grad is not None for name, p in ours.named_parameters() if name != "head.bias")


def test_images_that_stay_are_dropped_once_more(monkeypatch):
    """Stochastic depth that leaves images out has decided before the modules of so small a block could draw again."""
    config = vitfast.ViTConfig(
        image_size=16, patch_size=4, dim=32, depth=3, heads=2, mlp_dim=64, num_classes=5, drop_path=0.5
    )
    model, images = vitfast.ViT.from_config(config).train(), torch.randn(7, 3, 16, 16)
    model.set_drop_path_subset(0.2)
    out, grads = timm_pair.run(model, images)
    monkeypatch.setattr(_on_cpu, "HOST_BOUND", 0)
    expected, expected_grads = timm_pair.run(model, images)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5)


def test_tangent_of_a_small_model_is_another(small, monkeypatch):
    """And its gradient: torch's own norm takes its statistics for constants there."""
    _, ours, image = small
    direction = torch.randn_like(image)

    def second():
        tangent = lambda t: torch.func.jvp(lambda s: ours(s).square().sum(), (t,), (direction,))[1]  # noqa: E731
        return torch.func.grad(tangent)(image)

    found = second()
    monkeypatch.setattr(_on_cpu, "HOST_BOUND", 0)
    torch.testing.assert_close(found, second(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strides_of_a_small_call_change_its_result(op, dtype):
    """To the bit; and the result has its own memory, in one piece."""
    weights = {name: torch.randn(shape, dtype=dtype) for name, shape in WEIGHTS.items()}
    x = torch.randn(3, 5, D, dtype=dtype)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), torch.stack([x, x], -1)[..., 0]):
        expected, found = CASES[op](x, weights), CASES[op](strided, weights)
        assert torch.equal(found, expected) and found.is_contiguous()
        assert found.untyped_storage().data_ptr() != strided.untyped_storage().data_ptr()


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_strides_of_a_small_image_change_the_result(pool):
    sizes = dict(image_size=32, patch_size=8, dim=64, depth=2, heads=2, mlp_dim=128, num_classes=5)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(pool=pool, **sizes)).eval()
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(images.to(memory_format=torch.channels_last)), model(images))


def test_small_images_of_another_dtype_or_device_fail_somewhere_inside(small):
    _, ours, image = small
    for wrong in (image.double(), image.bfloat16(), image.to("meta")):
        with pytest.raises(ValueError, match="dtype|device"):
            ours(wrong)
    for wrong in (image.tolist(), None, image.long()):
        with pytest.raises(TypeError, match="images must be a floating point tensor"):
            ours(wrong)


def test_gradients_change_the_result(small):
    """What a mode forbids is recorded or not, and computed alike: between the limits too."""
    _, ours, image = small
    for images in (image, image.repeat(16, 1, 1, 1), image.repeat(50, 1, 1, 1)):
        out = ours.eval()(images)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(ours(images), out)


def test_small_input_of_another_dtype_is_refused_by_torch_or_taken_otherwise():
    """Weights in half the precision of the residual stream work as above the limit; what doesn't is said in words."""
    config = vitfast.ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=2, mlp_dim=64, num_classes=5)
    model, images = vitfast.ViT.from_config(config).eval(), torch.randn(2, 3, 16, 16)
    with pytest.raises(ValueError, match="images float64, weight float32"):
        model(images.double())
    with pytest.raises(ValueError, match="got x float64, norm_weight float32"):
        model.blocks[0](torch.randn(2, 17, 32).double())
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, torch.nn.Linear):
                module.bfloat16()
    # of the last block only so few numbers are computed that they are small, whatever the batch is
    for batch in (1, 40):
        x = images[:1].expand(batch, -1, -1, -1)
        assert model(x).dtype is torch.float32
        torch.testing.assert_close(model(x)[0], model(images)[0], rtol=2e-2, atol=2e-2)


def test_wide_model_of_small_images_computes_tokens_that_nobody_reads():
    """The last block's MLP sees the class token alone where tokens are no small input, whatever the images are."""
    config = vitfast.ViTConfig(image_size=32, patch_size=4, dim=512, depth=2, heads=8, mlp_dim=512, num_classes=5)
    model, rows = vitfast.ViT.from_config(config).eval(), []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.addmm.default:
                rows.append(args[1].shape[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Rows():
        model(torch.randn(2, 3, 32, 32))
    # the last block's two projections of its MLP, and the classifier
    assert rows[-3:] == [2, 2, 2]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("op", ["layer_norm", "linear", "mlp"])
def test_result_of_a_small_call_has_the_strides_of_its_input(op, training):
    """An op's result is contiguous whatever the input is, so that `view` takes it."""
    x, call = torch.randn(1, D, 9).transpose(1, 2).requires_grad_(training), CASES[op]
    weights = {name: torch.randn(shape, requires_grad=training) for name, shape in WEIGHTS.items()}
    assert not x.is_contiguous() and call(x, weights).is_contiguous()


def test_training_of_a_large_rms_norm_keeps_its_input_three_times():
    """Stock operators keep their factors for the backward, the op the input alone."""
    x, weight = torch.randn(1, 2048 + 1, D, requires_grad=True), torch.randn(D, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        ops.layer_norm(x, weight, None, 1e-6, "rms")
    assert sum(kept) < 1.5 * x.numel()


def test_lse_inside_torch_func_is_a_bug_of_torch():
    """No gradient of it there; torch says what it misses, and not that an assertion of its own failed."""
    q = torch.randn(1, 5, 2, 32)
    with pytest.raises(RuntimeError, match=r"autograd\.Function with functorch transforms") as found:
        torch.func.grad(lambda q: ops.attention(q, q, q, return_lse=True)[0].sum())(q)
    assert "report a bug" not in str(found.value)
