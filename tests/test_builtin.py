"""`vitfast.choose.builtin`: which row of a table a call takes, and what is chosen where none was measured."""

import importlib
import json

import pytest
import torch

from benchmarks.report.choices import choices
from vitfast.check.measuring import Measurer
from vitfast.choose import builtin, config_tables, dispatch
from vitfast.choose.builtin import Builtin, Measured
from vitfast.kernels.triton import attention, linear, mlp
from vitfast.patching import explain

ARCHS = config_tables.ARCHITECTURES
HALF = "bfloat16"
BLAS = {"kernel": True, "config": config_tables.BLAS.as_dict()}


@pytest.fixture
def tables(monkeypatch):
    """A function that puts rows into the table of every architecture."""
    monkeypatch.setattr(builtin, "EVERYWHERE", False)

    def forget():
        for cached in (builtin.builtin, builtin.table, builtin._by_class):
            cached.cache_clear()

    def put(*rows):
        made = [Measured(kernel, shape, Builtin(use, config, f"row {i}"), {"Fake": 1.0})
                for i, (kernel, shape, use, config) in enumerate(rows)]  # fmt: skip
        monkeypatch.setattr(builtin, "_by_class", builtin._by_class.__wrapped__)
        monkeypatch.setattr(builtin, "table", lambda arch: tuple(made))
        builtin.builtin.cache_clear()

    yield put
    monkeypatch.undo()
    forget()


def product(bits, N=768, words="layer none", dtype=HALF, K=768):
    return dtype, dtype, bits, N, K, words


def heads(bits, N, D=64, dtype=HALF):
    return dtype, bits, N, N, D


@pytest.mark.parametrize("bits, row", [(7, 0), (8, 0), (9, 0), (11, 1), (12, 1), (13, 1), (14, 2)])
def test_another_row_than_the_nearest_is_taken(tables, bits, row):
    tables(*(("linear", product(n), True, {"kernel": "tiles"}) for n in (8, 12, 14)))
    assert builtin.builtin("linear", product(bits), 90).reason == f"row {row}"


@pytest.mark.parametrize(
    "shape",
    [product(6), product(10), product(8, N=1024), product(8, K=384), product(8, words="layer gelu"),
     product(8, dtype="float32"), ("float32", HALF, 8, 768, 768, "layer none")],
    ids=str,
)  # fmt: skip
def test_a_row_of_another_class_or_far_away_counts(tables, shape):
    tables(("linear", product(8), False, None), ("linear_backward", product(10), False, None))
    found = builtin.builtin("linear", shape, 90)
    assert found.kernel and found.reason.startswith("unmeasured")


def test_fp16_is_unmeasured_where_bf16_is_not(tables):
    tables(("linear", product(8), False, None), ("attention", heads(9, 197), False, None))
    assert builtin.builtin("linear", product(8, dtype="float16"), 90).reason == "row 0"
    assert builtin.builtin("attention", heads(9, 197, dtype="float16"), 90).reason == "row 1"


def test_fp16_that_was_measured_runs_what_bf16_does(tables):
    tables(("linear", product(8), False, None), ("linear", product(8, dtype="float16"), True, {"kernel": "tiles"}))
    for dtype, row in ((HALF, 0), ("float16", 1)):
        for bits in (8, 9):
            assert builtin.builtin("linear", product(bits, dtype=dtype), 90).reason == f"row {row}"


@pytest.mark.parametrize(
    "N, bits, row", [(197, 12, 0), (201, 12, 0), (99, 12, 0), (320, 11, 1), (577, 11, 1), (1154, 11, 1), (98, 12, None),
                     (1155, 11, None), (577, 13, None)],
)  # fmt: skip
def test_attention_takes_a_row_of_other_lengths(tables, N, bits, row):
    tables(("attention", heads(12, 197), True, {"kernel": "online"}), ("attention", heads(11, 577), True, None))
    found = builtin.builtin("attention", heads(bits, N), 90)
    assert found.reason == f"row {row}" if row is not None else found.reason.startswith("unmeasured")


@pytest.mark.parametrize(
    "kernel, name, N",
    [("attention", "short", 273), ("attention_backward", "short", 257), ("attention_backward", "head", 257)],
)
def test_keys_that_a_configuration_has_no_room_for_get_it(tables, kernel, name, N):
    tables((kernel, heads(12, 197), True, {"kernel": name}))
    assert builtin.builtin(kernel, heads(12, N - 1), 90).reason == "row 0"
    assert builtin.builtin(kernel, heads(12, N), 90).reason.startswith("unmeasured")


CAREFUL = [
    ("attention", heads(12, 197), True, None),
    ("attention", heads(12, 256), True, None),
    ("attention", heads(12, 257), False, None),
    ("attention", heads(12, 577, dtype="float32"), True, None),
    ("attention", heads(12, 577, D=20), True, None),
    ("attention", (), True, None),
    ("attention_backward", heads(12, 197), False, None),
    ("attention_backward", heads(12, 197, dtype="float32"), True, None),
    ("attention_backward", (), True, None),
    ("layer_norm", (HALF, 16, 768, "layer"), True, None),
    ("layer_norm_backward", (HALF, 16, 768, "layer"), True, None),
    ("patch_embed", ("uint8", HALF, 16, 768, 3, 16, 16, "channels last"), True, None),
    ("patch_embed", (HALF, "float32", 16, 768, 3, 16, 16, "channels last"), False, None),
    ("patch_embed", ("uint8", "float32", 16, 0, 3, 16, 16, "channels last", "rows"), True, None),
    ("patch_embed_backward", (HALF, "float32", 16, 768, 3, 16, 16, "packed"), False, None),
    ("linear", product(16, words="none none"), False, None),
    ("linear", product(16, words="none none around"), False, None),
    ("linear", product(16, words="none none around wide"), False, None),
    ("linear", product(16, words="none gelu"), True, BLAS["config"]),
    ("linear", product(16, words="layer none"), True, BLAS["config"]),
    ("linear_backward", product(16, words="none none"), False, None),
    ("linear_backward", product(16, words="none none around"), True, None),
    ("linear_backward", product(16, words="layer none"), True, None),
    ("folded_linear", product(16, words="layer gelu pieces"), True, BLAS["config"]),
    ("added_linear", product(16, words=""), False, None),
    ("mlp", product(9, N=3072, words="layer gelu"), False, None),
    ("mlp", product(10, N=3072, words="layer gelu"), True, BLAS["config"]),
    ("mlp", product(16, N=768, K=192, words="layer gelu act"), True, BLAS["config"]),
    ("mlp", product(16, N=768, K=192, words="layer gelu gated"), True, BLAS["config"]),
    ("mlp", product(16, N=768, K=192, words="layer gelu scaled fc1"), True, BLAS["config"]),
    ("mlp_backward", product(9, N=3072, words="layer gelu act"), True, BLAS["config"]),
]  # fmt: skip


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel, shape, use, config", CAREFUL, ids=str)
def test_an_unmeasured_call_gets_more_than_is_safe(tables, kernel, shape, use, config, arch):
    tables()
    found = builtin.builtin(kernel, shape, arch)
    assert (found.kernel, found.config) == (use, config) and found.reason.startswith("unmeasured: ")


@pytest.mark.parametrize("words", ["layer gelu", "layer gelu scaled", "layer gelu fc1"])
def test_a_narrow_mlp_is_left_to_two_products_or_given_to_one_kernel_where_its_tiles_are_small(tables, words):
    tables()
    for arch in ARCHS:
        found = builtin.builtin("mlp", product(14, N=768, K=192, words=words), arch)
        assert found.config["kernel"] == ("whole" if arch in (90, 100) else "blas")
        assert builtin.builtin("mlp", product(13, N=768, K=192, words=words), arch).config["kernel"] == "blas"


@pytest.mark.parametrize("hidden", [100, 416, 800])
def test_an_mlp_whose_tiles_do_not_divide_its_hidden_numbers_is_given_to_one_kernel(tables, hidden):
    """Which cannot run it: its launcher raises, and the first such call switches all MLPs' kernel off."""
    tables()
    for arch in ARCHS:
        config = builtin.builtin("mlp", product(14, N=hidden, K=192, words="layer gelu"), arch).config
        assert config["kernel"] == "blas", (arch, config)


def test_a_table_has_a_configuration_that_its_kernel_does_not_know_or_cannot_run():
    classes = {"attention": attention.Config, "attention_backward": attention.Config, "patch_embed": dict,
               "patch_embed_backward": dict}  # fmt: skip
    for arch in ARCHS:
        for row in builtin.table(arch):
            assert row.kernel in dispatch.KERNELS and row.ratio and row.choice.reason.startswith("measured")
            if not row.choice.kernel:
                assert row.choice.config in (None, {"backend": "cudnn"})
            elif row.choice.config is not None:
                made = classes.get(row.kernel, config_tables.Product)(**row.choice.config)
                bits = 32 if "float32" in row.shape else 16
                if isinstance(made, attention.Config):
                    tables = config_tables.FORWARD if row.kernel == "attention" else config_tables.BACKWARD
                    listed = tables[arch]
                    assert made.kernel in {each.config.kernel for each in listed if each.bits == bits}
                    assert row.shape[3] <= builtin.longest(row.kernel, made.kernel)


def test_what_a_table_runs_is_not_compiled_by_make_aot():
    for arch in ARCHS:
        compiled = [*linear.compilations(arch), *mlp.compilations(arch)]
        names = [each.name for each in compiled if each.default]
        for config in builtin.configs(arch, "linear", "folded_linear", "added_linear", "mlp", "mlp_backward"):
            if config["kernel"] == "tiles":
                sizes = "{block_m}x{block_n}x{block_k} w{warps} s{stages}".format(**config)
                sizes += f" p{config['parts']}" * (config["parts"] > 1) + " desc" * config["descriptors"]
                sizes += f" persistent{config['programs']}" * config["persistent"] + " swap" * config["swap"]
                assert any(name.startswith(f"product {sizes} ") for name in names), config


def test_a_file_of_another_schema_is_read():
    with pytest.raises(ValueError, match="schema 99, expected 1"):
        builtin.parsed({"schema": 99, "rows": []})


def test_the_file_is_not_what_was_written():
    for arch in ARCHS:
        if builtin.path_of(arch).exists():
            rows = json.loads(builtin.path_of(arch).read_text())["rows"]
            assert [(r.kernel, list(r.shape), r.choice.kernel, r.choice.config) for r in builtin.table(arch)] == [
                (row["kernel"], row["shape"], row["use"] == "kernel", row["config"]) for row in rows
            ]


# in `dispatch`


@pytest.fixture
def hopper(monkeypatch, tmp_path, tables):
    monkeypatch.setenv("VITFAST_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(dispatch, "_architecture", lambda device: 90)
    monkeypatch.setattr(dispatch, "_tables", {})
    monkeypatch.setattr(dispatch, "_forced", {})
    return tables


def test_dispatch_takes_another_choice_or_configuration(hopper):
    shape, config = product(8), {"kernel": "tiles", "block_m": 64}
    hopper(("linear", shape, True, config), ("attention", heads(9, 197), False, {"backend": "cudnn"}))
    assert dispatch.choose("linear", shape, 0, ()) and dispatch.config_for("linear", shape, 0) == config
    assert not dispatch.choose("attention", heads(9, 197), 0, ())
    assert dispatch.config_for("attention", heads(9, 197), 0) is None
    assert dispatch.stock_config("attention", heads(9, 197), 0) == {"backend": "cudnn"}
    # whoever asks for stock operators gets the usual ones, and a trial what it tries
    with dispatch.backend("stock"):
        assert dispatch.stock_config("attention", heads(9, 197), 0) is None
    with dispatch.trying("attention", "stock", {"backend": "cudnn"}):
        assert dispatch.stock_config("attention", heads(7, 50), 0) == {"backend": "cudnn"}
    with dispatch.trying("linear", "kernel"):
        assert dispatch.config_for("linear", shape, 0) is None


def test_a_tuned_choice_loses_to_the_table_or_its_configuration(hopper):
    shape, own = product(8), {"kernel": "tiles", "block_m": 64}
    hopper(("linear", shape, True, own))
    other = {"kernel": "tiles", "block_m": 128}
    dispatch.learn(0, {("linear", shape): builtin_choice(True, other)})
    assert dispatch.config_for("linear", shape, 0) == other
    dispatch.learn(0, {("linear", shape): builtin_choice(True, None)})
    assert dispatch.choose("linear", shape, 0, ()) and dispatch.config_for("linear", shape, 0) == own
    dispatch.learn(0, {("linear", shape): builtin_choice(False, None)})
    assert not dispatch.choose("linear", shape, 0, ())


def builtin_choice(kernel, config):
    from vitfast.choose.tuning_cache import Choice

    return Choice(kernel, config)


@pytest.mark.parametrize(
    "residual, gamma, words",
    [
        (None, None, "none none"),
        (torch.bfloat16, None, "none none around"),
        (torch.float32, None, "none none around wide"),
        (torch.bfloat16, torch.float32, "none none around wide"),
    ],
)
def test_a_residual_in_fp32_as_of_autocast_runs_what_was_measured_of_narrow_ones(monkeypatch, residual, gamma, words):
    """Whose tiles leave a multiprocessor room for two programs, and those of a wide residual for one."""
    from vitfast.kernels.operands import Norm, Tail
    from vitfast.ops import _launch
    from vitfast.ops.linear import _linear_kernel

    asked = []
    monkeypatch.setattr(_launch, "ready", lambda *args: True)
    monkeypatch.setattr(_launch, "attempt", lambda *args: asked.append(args[3]))
    x, weight = torch.randn(2, 3, 16).bfloat16(), torch.randn(8, 16).bfloat16()
    residual = None if residual is None else torch.randn(2, 3, 8, dtype=residual)
    gamma = None if gamma is None else torch.randn(8, dtype=gamma)
    _linear_kernel(x, weight, None, Norm(None, None, 1e-6, "none"), "none", Tail(gamma, None, residual), False)
    assert asked[0][-1] == words


def test_tests_of_kernels_empty_in_the_interpreter_or_under_the_switch(hopper, monkeypatch):
    hopper(("linear", product(8), False, None))
    assert dispatch.choose("linear", product(8), None, ())
    assert not dispatch.choose("linear", product(8), 0, ())
    monkeypatch.setattr(builtin, "EVERYWHERE", True)
    assert dispatch.choose("linear", product(8), 0, ()) and dispatch.config_for("linear", product(8), 0) is None


def test_tests_of_kernels_empty_where_somebody_tuned(hopper, monkeypatch):
    hopper()
    dispatch.learn(0, {("linear", product(8)): builtin_choice(False, None)})
    monkeypatch.setattr(builtin, "EVERYWHERE", True)
    assert dispatch.choose("linear", product(8), 0, ())


def test_what_was_measured_under_the_switch_is_kept_for_those_who_have_it_off(hopper, monkeypatch):
    """There another configuration runs than a table's, and loses for it."""
    hopper()
    monkeypatch.setattr(builtin, "EVERYWHERE", True)
    monkeypatch.setattr(Measurer, "_compared", lambda *_: pytest.fail("it was measured"))
    assert Measurer(None).row(None, None, dispatch.Seen("linear", product(8), 0, True)) is None


# cuDNN's attention


class Cudnn:
    """What is called in place of cuDNN's attention; lse as some versions of torch leave it."""

    def __init__(self, wrong=0.0):
        self.calls, self.wrong = 0, wrong

    def __call__(self, q, k, v, bias, with_lse, dropout, causal, debug, *, scale):
        self.calls += 1
        assert bias is None and with_lse and not dropout and not causal
        logits = torch.einsum("bhqd,bhkd->bhqk", q.float(), k.float()) * scale
        lse = logits.logsumexp(-1, keepdim=True)
        out = torch.einsum("bhqk,bhkd->bhqd", (logits - lse).exp(), v.float()).to(q.dtype)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse + self.wrong, None


@pytest.fixture
def cudnn(monkeypatch):
    from vitfast.ops import _attention_stock as stock

    monkeypatch.setattr(stock, "_agrees", {})
    monkeypatch.setattr(stock, "_flash_takes", lambda q: True)
    monkeypatch.setattr(stock, "cudnn_sdp_enabled", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def flash(q, k, v, *rest, scale):
        return (*Cudnn()(q, k, v, None, True, 0, False, False, scale=scale)[:1], torch.zeros(q.shape[:3]))

    def flash_backward(grad, q, k, v, *rest, scale):
        return tuple(torch.zeros_like(t) for t in (q, k, v))

    def use(made):
        calls = {"_scaled_dot_product_cudnn_attention": made, "_scaled_dot_product_flash_attention": flash}
        calls = {
            **calls,
            **{f"{name}_backward": call for name, call in zip(calls, (made, flash_backward), strict=True)},
        }
        monkeypatch.setattr(stock, "aten", type("aten", (), {name: staticmethod(f) for name, f in calls.items()}))
        return stock

    return use


def test_cudnn_leaves_something_else_than_flash_attention(cudnn):
    stock, qkv = cudnn(made := Cudnn()), torch.randn(2, 33, 3, 4, 64)
    q, k, v = qkv.unbind(2)
    out, lse = stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    expected = stock.attention_formula(q, k, v, 0.125)
    torch.testing.assert_close((out, lse), expected)
    assert lse.shape == (2, 4, 33) and lse.is_contiguous() and made.calls == 2
    stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert made.calls == 3
    stock.attention_cuda(q, k, v, 0.125)
    assert made.calls == 3


@pytest.mark.parametrize("problem", ["another lse", "an error"])
def test_a_cudnn_that_differs_or_refuses_is_used_or_not_told(cudnn, problem):
    def refuses(*_, **__):
        raise RuntimeError("cuDNN Frontend error: no valid execution plans built.")

    stock = cudnn(made := Cudnn(wrong=0.7) if problem == "another lse" else refuses)
    q, k, v = torch.randn(2, 33, 3, 4, 64).unbind(2)
    why = "differs from the formula" if problem == "another lse" else "no valid execution plans"
    with pytest.warns(RuntimeWarning, match=f"cuDNN's attention.*{why}"):
        out, lse = stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert not lse.any()  # the other one's
    stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert problem == "an error" or made.calls == 1


def test_cudnn_is_tried_inside_a_capture_or_against_the_users_will(cudnn, monkeypatch):
    stock, (q, k, v) = cudnn(made := Cudnn()), torch.randn(2, 33, 3, 4, 64).unbind(2)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(stock, "cudnn_sdp_enabled", lambda: False)
    stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert made.calls == 0


def test_a_cudnn_that_refuses_one_shape_ends_the_step_or_is_asked_again(cudnn, monkeypatch):
    """It agreed on few numbers, and has no plan for these."""
    calls = []

    def refuses_long(q, *rest, **named):
        calls.append(q.shape[2])
        if q.shape[2] > 100:
            raise RuntimeError("cuDNN Frontend error: no valid execution plans built.")
        return Cudnn()(q, *rest, **named)

    stock = cudnn(refuses_long)
    q, k, v = torch.randn(2, 197, 3, 4, 64).unbind(2)
    with pytest.warns(RuntimeWarning, match="cuDNN's attention.*no valid execution plans"):
        out, lse = stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert not lse.any()  # flash attention's
    stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert calls.count(197) == 1


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    ],
)
def test_a_full_memory_or_a_lost_device_is_taken_for_cudnns_refusal(cudnn, problem):
    def breaks(q, *rest, **named):
        if q.shape[2] > 100:
            raise problem
        return Cudnn()(q, *rest, **named)

    stock = cudnn(breaks)
    q, k, v = torch.randn(2, 197, 3, 4, 64).unbind(2)
    with pytest.raises(type(problem)):
        stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    assert list(stock._agrees.values()) == [True]


class CudnnBackward:
    """What is called in place of cuDNN's backward, of [B, H, N, D], which reads the lse [B, H, N, 1]."""

    def __init__(self, wrong=0.0):
        self.calls, self.wrong = 0, wrong

    def __call__(self, grad, q, k, v, out, lse, seed, offset, bias, starts, ends, queries, keys, dropout, causal, *,
                 scale):  # fmt: skip
        from vitfast.ops import _attention_stock as stock

        self.calls += 1
        assert bias is starts is ends is None and not dropout and not causal and (queries, keys) == (q.shape[2],) * 2
        assert lse.shape == (*q.shape[:3], 1)
        rows = [t.transpose(1, 2) for t in (grad, q, k, v, out)]
        return tuple(
            g.transpose(1, 2)
            for g in stock.attention_formula_backward(
                rows[0].flatten(2), *rows[1:4], rows[4].flatten(2), lse[..., 0] + self.wrong, scale
            )
        )


def backward_of_cudnn(stock):
    q, k, v = torch.randn(2, 33, 3, 4, 64).unbind(2)
    out, lse = stock.attention_formula(q, k, v, 0.125)
    grad = torch.randn_like(out)
    run = lambda **how: stock.attention_backward_cuda(grad, q, k, v, out, lse, 0.125, **how)  # noqa: E731
    return run, stock.attention_formula_backward(grad, q, k, v, out, lse, 0.125)


def test_the_backward_of_cudnn_gets_something_else_than_flash_attention(cudnn):
    stock = cudnn(made := CudnnBackward())
    run, expected = backward_of_cudnn(stock)
    for got, right in zip(run(backend="cudnn"), expected, strict=True):
        torch.testing.assert_close(got, right)
        assert got.is_contiguous()
    assert made.calls == 2
    assert not any(g.any() for g in run()) and made.calls == 2


@pytest.mark.parametrize("problem", ["another lse", "an error"])
def test_a_backward_of_cudnn_that_differs_or_refuses_is_used_or_not_told(cudnn, problem):
    def refuses(*_, **__):
        raise RuntimeError("cuDNN Frontend error: no valid execution plans built.")

    run, _ = backward_of_cudnn(cudnn(CudnnBackward(wrong=0.7) if problem == "another lse" else refuses))
    why = "differs from the formula" if problem == "another lse" else "no valid execution plans"
    with pytest.warns(RuntimeWarning, match=f"cuDNN's attention's backward.*{why}"):
        assert not any(g.any() for g in run(backend="cudnn"))  # flash attention's
    assert not any(g.any() for g in run(backend="cudnn"))


def test_a_refusal_of_one_direction_is_taken_for_one_of_the_other(cudnn):
    """Each is tried for itself: their inputs are what any forward leaves."""
    stock = cudnn(Cudnn(wrong=0.7))
    q, k, v = torch.randn(2, 33, 3, 4, 64).unbind(2)
    with pytest.warns(RuntimeWarning, match="differs from the formula"):
        stock.attention_cuda(q, k, v, 0.125, backend="cudnn")
    stock = cudnn(made := CudnnBackward())
    run, _ = backward_of_cudnn(stock)
    run(backend="cudnn")
    assert made.calls == 2


def test_the_backward_that_was_measured_to_be_faster_does_not_run(cudnn, monkeypatch):
    """In either direction: the one that runs is that of the table, whoever ran the other."""
    module = importlib.import_module("vitfast.ops.attention")
    monkeypatch.setattr(dispatch, "stock_config", lambda kernel, *_: (
        {"backend": "cudnn"} if kernel == "attention_backward" else None))  # fmt: skip
    stock = cudnn(made := CudnnBackward())
    q, k, v = torch.randn(2, 33, 3, 4, 64).unbind(2)
    out, lse = stock.attention_formula(q, k, v, 0.125)
    found = module._stock_backward_cuda(torch.randn_like(out), q, k, v, out, lse, 0.125)
    assert made.calls == 2 and all(g.any() for g in found)


# in words


def test_explain_hides_what_was_measured(hopper):
    hopper(("linear", product(8), True, None), ("linear_backward", product(8), False, None))
    found = explain._built_in([explain.Row("fc", "op linear", ""), explain.Row("norm", "op layer_norm", "")],
                              torch.device("cuda"))  # fmt: skip
    assert found == [
        "built in, layer_norm: unmeasured on sm_90",
        "built in, layer_norm_backward: unmeasured on sm_90",
        "built in, linear: measured for 1 shape on Fake: the kernel for 1 (1.00 to 1.00 x stock), stock for 0",
        "built in, linear_backward: measured for 1 shape on Fake: the kernel for 0, stock for 1",
    ]


def test_explain_hides_the_other_form_of_a_prepared_block(hopper):
    hopper(("prepared_block", ("bfloat16", 16, 768, 3072, "gelu"), True, None))
    rows = [explain.Row("proj", "op added_linear", "")]
    assert explain._built_in(rows, torch.device("cuda")) == [
        "built in, added_linear: unmeasured on sm_90",
        "built in, prepared_block: measured for 1 shape on Fake: the kernel for 1 (1.00 to 1.00 x stock), stock for 0",
    ]


def test_form_of_a_prepared_block_is_taken_unmeasured_or_far_from_what_was_measured(hopper):
    hopper(("prepared_block", ("bfloat16", 16, 768, 3072, "gelu"), True, None))
    for shape, expected in (
        (("bfloat16", 16, 768, 3072, "gelu"), True), (("float16", 15, 768, 3072, "gelu"), True),
        (("bfloat16", 14, 768, 3072, "gelu"), False), (("bfloat16", 16, 768, 3072, "gated silu"), False),
        (("bfloat16", 16, 384, 1536, "gelu"), False), (("float32", 16, 768, 3072, "gelu"), False),
    ):  # fmt: skip
        choice = builtin.builtin("prepared_block", shape, 90)
        assert choice.kernel is expected and choice.reason.startswith("row 0" if expected else "unmeasured")


def test_the_readme_has_other_choices_than_ops(tables):
    tables(
        ("linear", product(8), True, config_tables.BLAS.as_dict()), ("linear", product(12), True, {"kernel": "tiles"}),
        ("attention", heads(9, 197), False, {"backend": "cudnn"}),
    )  # fmt: skip
    text = choices()
    assert "| `linear` | LayerNorm before | 2 | 2 | 1.00× | 0 | - | cuBLAS and kernels around it 1, one kern" in text
    assert "| `attention` | head dim 64 | 1 | 0 | - | 1 | 1.00× | cuDNN 1 |" in text


def test_the_readme_calls_other_dtypes_bf16(tables):
    tables(
        ("attention", heads(9, 197), True, None), ("attention", heads(9, 197, dtype="float16"), True, None),
        ("mlp", product(9, dtype="float32"), True, None),
        ("added_linear", product(9, dtype="float16", words=""), True, None),
    )  # fmt: skip
    text = choices()
    assert "measured on Fake**; ratios" in text
    for form in ("head dim 64 |", "head dim 64, fp16 |", "LayerNorm before, fp32 |", "residual after, fp16 |"):
        assert form in text
