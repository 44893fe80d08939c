"""The cases of benchmarks: everybody computes the same, and each row says truly what it compares."""

import contextlib
import importlib.util
import itertools
import json
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
from textbook import Textbook

import vitfast
from benchmarks.core import apart, compilers, models, ops, rivals, steps
from benchmarks.core.steps import MODES as MODEL_MODES
from vitfast.check import acceptance
from vitfast.check.case import DTYPES, Case

TINY_VIT = {"model": "vit_tiny_patch16_224", "size": 32, "depth": 2}
TINY_DINO = {"model": "vit_small_patch14_dinov2", "size": 28, "depth": 2}
MODELS = {
    "vit": partial(models.vit, batch=2, **TINY_VIT),
    "dinov2": partial(models.vit, batch=2, **TINY_DINO),
    "vit-pytorch": partial(models.vit, batch=2, model=models.VIT_PYTORCH, size=32, depth=2),
    "cnn": partial(models.cnn, model="mobilenetv3_large_100", size=32, batch=4),
}
PRECISIONS = [("fp32", False), ("bf16", False), ("bf16", True)]
# a CPU has none of these
ON_A_GPU = {"SDPA cuDNN", "SDPA efficient", "SDPA packed cuDNN", "Liger", "add, Liger"}


TORCH_COMPILE = torch.compile


@pytest.fixture(autouse=True)
def compiled_by_nobody(request, monkeypatch):
    """Inductor takes seconds a function; what is traced and computed is the same without it."""
    if "slow" not in request.keywords:
        monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: by_backend("eager", f, dynamic))
    yield
    torch._dynamo.reset()


def by_backend(backend, function, dynamic):
    return TORCH_COMPILE(function, dynamic=dynamic, backend=backend)


def tiny_ops(mode, dtype="fp32", names=tuple(ops.FACTORIES)):
    return [make() for make in ops.tiny(names, device="cpu", dtypes=[dtype], batches=[2], modes=[mode])]


def as_tuple(results):
    return results if isinstance(results, tuple) else (results,)


def draw(case: Case, seed=0):
    return case.inputs(torch.Generator(case.device).manual_seed(seed))


def truth_of(case, given):
    cut = case.cut(given, case.check_images)
    return as_tuple(case.reference(*(t.double() if t.is_floating_point() else t for t in cut)))


def results_of(case, given):
    """By variant, of those that are here; reasons of the others."""
    found, why_not = {}, {}
    for name, variant in case.variants.items():
        if missing := variant.missing():
            why_not[name] = missing
            continue
        try:
            function = variant.build()
            results = function(*given)
        except (NotImplementedError, RuntimeError) as problem:
            why_not[name] = str(problem)
            continue
        found[name] = as_tuple(results)
        # again: nothing is left over from the first call
        again = as_tuple(function(*given))
        assert all(torch.equal(a, b) for a, b in zip(found[name], again, strict=True)), name
    return found, why_not


def relative(out, ref):
    return ((out.double() - ref).norm() / ref.norm()).item()


def judge(out, exact, low, dtype, grad, what):
    """`accept`; where stock is no yardstick (on CPUs it adds up norms in bf16), no further off than stock."""
    limit = acceptance.YARDSTICK_EPS[dtype] * torch.finfo(dtype).eps
    if relative(low, exact) <= limit:
        acceptance.accept(out, exact, low, dtype=dtype, grad=grad, what=what)
    else:
        assert out.dtype == low.dtype and out.shape == low.shape, what
        assert relative(out, exact) <= acceptance.RMS_RATIO[dtype] * relative(low, exact), what


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", ops.MODES)
def test_a_way_to_compute_an_op_is_another_op_or_changes_its_inputs(mode, dtype):
    for case in tiny_ops(mode, dtype):
        given = draw(case)
        before = [t.clone() for t in given]
        found, why_not = results_of(case, given)
        ref = truth_of(case, given)
        # in bf16 what the CPU's products round is in all of them
        with Textbook() if dtype == "fp32" else contextlib.nullcontext():
            lows = as_tuple(case.variants[case.yardstick].build()(*given))
        for name, results in found.items():
            if case.variants[name].part:
                continue
            assert len(results) == len(case.per_image) == len(ref), (case.key, name)
            for out, exact, low in zip(results, ref, lows, strict=True):
                what = f"{case.key} {name}"
                judge(out, exact, low, DTYPES[dtype], mode != "forward", what)
        assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True)), case.key
        installed = {name for name in case.variants if not case.variants[name].missing()}
        assert installed - found.keys() <= ON_A_GPU, (case.key, why_not)
        assert all(case.variants[name].part == (name == "product") for name in case.variants)
        assert [name for name, v in case.variants.items() if v.ours] == ["vitfast"]


# a network of convolutions takes long in bf16 on a CPU, and half of the others' training says the same in fp32
RIVALS = [
    pytest.param(
        name, mode, *precision,
        marks=pytest.mark.full if mode == "training" and precision[0] == "bf16" and name != "vit" else (),
    )
    for name in MODELS
    for mode in ("inference", "training")
    for precision in PRECISIONS
]  # fmt: skip


@pytest.mark.parametrize("name, mode, dtype, autocast", RIVALS, ids=str)
def test_a_rival_is_another_model_or_changes_its_inputs(name, mode, dtype, autocast):
    # the compilers of a CPU are in a test of their own
    group = "eager" if mode == "inference" else "all"
    case = MODELS[name](mode=mode, dtype=dtype, autocast=autocast, group=group)
    given = draw(case)
    before = [t.clone() for t in given]
    found, _ = results_of(case, given)
    ref = truth_of(case, given)
    assert {v for v in found if case.variants[v].ours} >= (set() if name == "cnn" else {"vitfast"})
    chaotic = name == "cnn" and mode == "training"
    for variant, results in found.items():
        assert len(results) == len(case.per_image) == len(ref)
        for out, exact in zip(results, ref, strict=True):
            assert out.shape == exact.shape, variant
            # batch norm of 4 images of a pixel each forgets what it was given
            assert chaotic or relative(out, exact) < (1e-5 if dtype == "fp32" else 5e-2), (variant, case.key)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_a_library_is_left_out_where_it_has_the_model():
    found = {}
    for name, mode in itertools.product(MODELS, MODEL_MODES):
        case = MODELS[name](mode=mode, dtype="fp32", group="eager")
        found[name, mode] = set(results_of(case, draw(case))[0])
    assert found["vit", "inference"] == {"timm", "vitfast", "vitfast prepared", "torchvision", "Hugging Face"}
    assert found["vit", "training"] == {"timm", "vitfast", "torchvision", "Hugging Face"}
    assert found["dinov2", "inference"] == {"timm", "vitfast", "vitfast prepared", "Hugging Face"}
    assert found["vit-pytorch", "inference"] == {"vit-pytorch", "vitfast", "vitfast prepared"}
    assert found["cnn", "inference"] == {"timm", "timm channels_last"}


# by dtype: what is as exact as the row's dtype
EXACT = {
    "fp32": ("timm compiled", "timm max-autotune", "ONNX Runtime", "OpenVINO"),
    "bf16": ("timm compiled", "timm max-autotune", "ONNX Runtime fp32", "OpenVINO"),
}
INT8 = ("ONNX Runtime int8", "OpenVINO int8")


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize("dtype", EXACT)
def test_a_compiler_of_the_cpu_computes_something_else(dtype):
    case = MODELS["vit"](dtype=dtype)
    given = draw(case)
    (ref,) = truth_of(case, given)
    assert {*EXACT[dtype], *INT8} <= case.variants.keys()
    for name in EXACT[dtype]:
        if not case.variants[name].missing():
            out = case.variants[name].build()(*given)
            assert relative(out, ref) < (1e-5 if dtype == "fp32" else 5e-2), name
            assert case.variants[name].tolerance is None, name


def test_a_product_that_is_autotuned_is_not_frozen_or_the_other_is_autotuned_too(monkeypatch):
    """Inductor's own templates take constant weights only; without them it compiles the same as without autotuning."""
    seen = []

    def compiled(function, mode=None):
        config = torch._inductor.config
        return lambda x: seen.append((config.freezing, config.max_autotune, config.cpp_wrapper)) or function(x)

    monkeypatch.setattr(compilers, "compiled", compiled)
    case = MODELS["vit"](dtype="bf16", group="all")
    for name in ("timm compiled", "timm max-autotune"):
        case.variants[name].build()
        assert case.variants[name].apart is None
    assert seen == [(True, False, False), (True, True, True)]
    alone = MODELS["vit"](dtype="bf16", group="autotuned").variants
    assert [name for name in alone if not name.startswith("vitfast")] == ["timm", "timm max-autotune"]


@pytest.mark.parametrize("int8", [False, True], ids=["", "int8"])
@pytest.mark.parametrize("dtype, hint", [("fp32", "f32"), ("bf16", "bf16")])
def test_openvino_has_other_threads_or_computes_in_another_dtype(dtype, hint, int8, monkeypatch):
    """Then it is slower than it need be, and right."""
    seen = {}

    class Core:
        def compile_model(self, model, device, settings):
            seen.update(settings)
            return self

        def create_infer_request(self):
            return None

    # in place of a package that tests do not install
    package = types.SimpleNamespace(convert_model=lambda model, **given: model, Core=Core)
    monkeypatch.setitem(sys.modules, "openvino", package)
    monkeypatch.setitem(sys.modules, "openvino_telemetry", None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(compilers, "_calibrated", lambda converted, example: converted)
    compilers.openvino(torch.nn.Linear(4, 2), torch.zeros(1, 4), dtype, int8)
    assert (seen["INFERENCE_NUM_THREADS"], seen["INFERENCE_PRECISION_HINT"]) == (3, hint)


def test_onnx_runtime_has_other_threads(monkeypatch):
    onnxruntime, seen = pytest.importorskip("onnxruntime"), []
    pytest.importorskip("onnxscript")
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(
        onnxruntime,
        "InferenceSession",
        lambda file, options, **how: seen.append(options) or session(file, options, **how),
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    compilers.onnx_runtime(torch.nn.Linear(4, 2), torch.zeros(1, 4))
    assert [options.intra_op_num_threads for options in seen] == [3]


def test_onnx_runtime_has_one_scale_for_all_channels_of_a_weight(tmp_path):
    """Then int8 is further off than that runtime's best."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript"), pytest.importorskip("onnxruntime")
    file = tmp_path / "model.onnx"
    torch.onnx.export(torch.nn.Linear(4, 3), (torch.zeros(1, 4),), file, dynamo=True, verbose=False)
    weights = {each.name: each for each in onnx.load(compilers._in_int8(file)).graph.initializer}
    assert list(weights["weight_scale"].dims) == [3]
    assert weights["weight_quantized"].data_type == onnx.TensorProto.INT8


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_model_in_int8_computes_in_fp32_or_is_held_to_the_rule_of_bf16(dtype):
    """One that was not quantised is exact to 1e-6; one that is wrong, far beyond what int8 may be off."""
    case = MODELS["vit"](dtype=dtype, group="compiled")
    given = draw(case)
    (ref,) = truth_of(case, given)
    for name in INT8:
        variant = case.variants[name]
        assert variant.tolerance == models.INT8_ERROR and not variant.ours
        if not variant.missing():
            function = variant.build()
            out = function(*given)
            assert 2e-3 < relative(out, ref) < models.INT8_ERROR, name
            assert torch.equal(out, function(*given)), name
            # other images, and not those that it was made with
            other = draw(case, seed=1)
            assert relative(function(*other), truth_of(case, other)[0]) < models.INT8_ERROR, name


def test_int8_may_be_further_off_than_is_said():
    page = (Path(__file__).parent.parent / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert f"and may be {100 * models.INT8_ERROR:g} %" in " ".join(page.split())


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_a_variant_leaves_autocast(mode):
    case = MODELS["vit"](mode=mode, dtype="bf16", autocast=True)
    given = draw(case)
    assert given[0].dtype == torch.float32 and "vitfast prepared" not in case.variants
    found, _ = results_of(case, given)
    assert {"timm", "vitfast", "torchvision", "Hugging Face", "timm compiled"} <= found.keys()
    (ref, *_) = truth_of(case, given)
    for name, (logits, *grads) in found.items():
        # fp32 would be exact to 1e-6
        assert relative(logits, ref) > 5e-4, name
        assert all(g.dtype == torch.float32 for g in grads), name
    assert not torch.is_autocast_enabled("cpu")


def test_a_training_step_leaves_gradients_behind_or_updates_weights():
    case = MODELS["vit"](mode="training", dtype="fp32")
    given = draw(case)
    function = case.variants["vitfast"].build()
    first = function(*given)
    other = function(*draw(case, seed=1))
    assert not torch.equal(first[1], other[1])
    assert all(torch.equal(a, b) for a, b in zip(first, function(*given), strict=True))


def all_cases():
    for mode in ops.MODES:
        yield from tiny_ops(mode, "bf16")
    for make, mode in itertools.product(MODELS.values(), MODEL_MODES):
        yield make(mode=mode, dtype="bf16", autocast=True)


def test_a_case_made_from_its_notes_is_another():
    for case in all_cases():
        again = apart.rebuild(json.loads(json.dumps(case.notes)))
        assert (again.key, again.work, list(again.variants)) == (case.key, case.work, list(case.variants))
        assert (again.baseline, again.yardstick, again.per_image) == (case.baseline, case.yardstick, case.per_image)
        assert json.loads(json.dumps(again.notes)) == json.loads(json.dumps(case.notes))
        assert all(torch.equal(a, b) for a, b in zip(draw(case), draw(again), strict=True)), case.key


def test_two_rows_have_one_key_or_a_row_has_no_work():
    cases = list(all_cases())
    for case in cases:
        assert case.work.bytes > 0 and (case.work.flops > 0 or "norm" in case.name), case.key
        assert case.baseline in case.variants and case.yardstick in case.variants
        assert next(iter(case.variants)) == case.baseline
        one = case.cut(draw(case), 1)
        images = [t for t, u in zip(one, draw(case), strict=True) if t.shape != u.shape]
        assert images and all(len(t) == 1 for t in images), case.key
    assert len({case.key for case in cases}) == len(cases)
    groups = [MODELS["vit"](group=group).key for group in ("eager", "compiled", "autotuned")]
    assert len(set(groups)) == 3


def test_a_larger_batch_starts_with_other_images_or_labels():
    make = partial(MODELS["vit"], mode="training", dtype="bf16")
    small, large = draw(make(batch=2)), draw(make(batch=5))
    assert all(torch.equal(a, b[:2]) for a, b in zip(small, large, strict=True))


def test_images_or_weights_differ_between_dtypes():
    drawn = [draw(MODELS["vit"](dtype=dtype))[0].double() for dtype in DTYPES]
    assert all(torch.equal(drawn[0], other) for other in drawn[1:])
    weights = rivals.random_weights({"w.weight": torch.empty(64, 64), "b.bias": torch.empty(64), "pos_embed": drawn[0]})
    for name, value in weights.items():
        assert all(torch.equal(value, value.to(dtype).float()) for dtype in DTYPES.values()), name
        assert ((value == 0) | (value == 1)).double().mean() < 0.02, name


def test_the_reference_is_computed_again_for_each_row_or_kept_for_other_images(monkeypatch):
    models._TRUTHS.clear()
    made = []
    real = rivals.of_timm
    monkeypatch.setattr(rivals, "of_timm", lambda *a: made.append(a) or real(*a))
    make = MODELS["vit"]
    (first,) = truth_of(make(batch=8, dtype="fp32"), draw(make(batch=8, dtype="fp32")))
    # the first eight of more are the same
    for case in (make(batch=8, dtype="bf16"), make(batch=9, dtype="bf16", autocast=True)):
        (ref,) = truth_of(case, draw(case))
        assert torch.equal(ref, first)
    assert len(made) == 1
    (other,) = truth_of(make(batch=8), draw(make(batch=8), seed=1))
    assert len(made) == 2 and not torch.equal(other, first)
    # a gradient is that of all images together
    for batch in (4, 2):
        truth_of(make(batch=batch, mode="training"), draw(make(batch=batch, mode="training")))
    assert len(made) == 4


def without(monkeypatch, *names):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name.split(".")[0] in names else real(name, *a)
    )


def test_a_rival_that_is_not_installed_is_not_listed(monkeypatch):
    attention = ("flash_attn", "flash_attn_interface")
    without(monkeypatch, *attention, "liger_kernel", "torchvision", "transformers", "openvino", "nncf")
    absent = {}
    for case in [*tiny_ops("forward"), MODELS["vit"](dtype="fp32")]:
        absent |= {name: v.missing() for name, v in case.variants.items() if v.missing()}
    assert absent == {
        "flash-attn 2": ["flash_attn"], "flash-attn 3": ["flash_attn_interface"], "flash-attn 4": ["flash_attn"],
        "Liger": ["liger_kernel"], "add, Liger": ["liger_kernel"], "torchvision": ["torchvision"],
        "Hugging Face": ["transformers"], "OpenVINO": ["openvino"],
        "OpenVINO int8": ["openvino", "nncf"],
    }  # fmt: skip


def test_without_timm_or_vit_pytorch_ours_is_timed_unjudged(monkeypatch):
    for name, package in (("vit", "timm"), ("vit-pytorch", "vit_pytorch"), ("cnn", "timm")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ModuleNotFoundError, match=package):
            MODELS[name]()


def test_hugging_faces_names_before_release_5_are_not_known():
    timm = {"cls_token": torch.randn(1, 1, 4), "pos_embed": torch.randn(1, 5, 4)}
    old = {"vit.embeddings.cls_token": "cls_token", "vit.embeddings.position_embeddings": "pos_embed"}
    layer, block = "vit.encoder.layer.0.", "blocks.0."
    names = {
        "vit.embeddings.patch_embeddings.projection": "patch_embed.proj", "vit.layernorm": "norm",
        "classifier": "head", layer + "layernorm_before": block + "norm1", layer + "layernorm_after": block + "norm2",
        layer + "attention.output.dense": block + "attn.proj", layer + "intermediate.dense": block + "mlp.fc1",
        layer + "output.dense": block + "mlp.fc2",
    }  # fmt: skip
    for kind in ("weight", "bias"):
        for theirs, ours in names.items():
            old[f"{theirs}.{kind}"] = f"{ours}.{kind}"
            timm[f"{ours}.{kind}"] = torch.randn(4)
        timm[f"blocks.0.attn.qkv.{kind}"] = torch.randn(12, 4)
    parts = [f"{layer}attention.attention.{part}" for part in ("query", "key", "value")]
    shapes = {name: timm[ours] for name, ours in old.items()}
    shapes |= {f"{part}.{kind}": torch.empty(4, 4) for part in parts for kind in ("weight", "bias")}
    theirs, by_ours = rivals.from_timm(shapes, timm, rivals.HUGGING_FACE)
    assert all(theirs[name] is timm[ours] for name, ours in old.items())
    assert torch.equal(torch.cat([theirs[f"{part}.weight"] for part in parts]), timm["blocks.0.attn.qkv.weight"])
    assert by_ours["blocks.0.attn.qkv.weight"] == [f"{part}.weight" for part in parts]
    with pytest.raises(NotImplementedError, match="unknown.weight"):
        rivals.from_timm(shapes | {"unknown.weight": torch.empty(1)}, timm, rivals.HUGGING_FACE)
    with pytest.raises(NotImplementedError, match="norm.bias"):
        fewer = {name: like for name, like in shapes.items() if name != "vit.layernorm.bias"}
        rivals.from_timm(fewer, timm, rivals.HUGGING_FACE)


def test_the_ninth_shape_of_a_function_is_no_longer_compiled(monkeypatch):
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: by_backend(backend, f, dynamic))

    def double(x):
        return 2 * x

    for n in range(2, 14):
        assert compilers.compiled(double)(torch.ones(n)).sum() == 2 * n
    assert len(compilations) == 12


def test_a_shape_is_not_among_the_rows_that_were_asked_for():
    tokens, widths = (197, 1370), (384, 768)
    cases = [make() for make in ops.listed(device="cuda", dtypes=["bf16"], batches=[64], tokens=tokens, widths=widths)]
    shapes = {(case.name, case.mode, *case.shape.values()) for case in cases}
    assert len(shapes) == len(cases)
    for n, mode in itertools.product(tokens, ops.MODES):
        assert {("attention", mode, n, heads, dim) for dim, heads in ((64, 12), (72, 16), (80, 16))} <= shapes
        linears = ("linear norm qkv", "linear proj", "linear norm fc1", "linear fc2")
        names = ("layer_norm", "add_layer_norm", *linears, "mlp")
        assert {(name, mode, n, width) for name in names for width in widths} <= shapes
        for width, images in itertools.product(widths, ("float", "uint8")):
            assert (f"patch_embed {images}", mode, *ops.IMAGES[n], width) in shapes
    # what matters most comes first
    assert [case.shape["tokens"] for case in cases if case.name == "mlp"][:3] == [197, 197, 197]
    assert ops.mlp(batch=1, tokens=2, width=8, act="gelu_tanh").name == "mlp gelu_tanh"


def test_a_gpu_lacks_a_compiler_or_replays_what_has_graphs_of_its_own():
    variants = models.vit(batch=1, device="cuda", **TINY_VIT).variants
    assert {"timm compiled", "timm reduce-overhead", "timm max-autotune"} <= variants.keys()
    assert not {"OpenVINO", "ONNX Runtime"} & variants.keys()
    own_graphs = {"timm reduce-overhead", "timm max-autotune", "vitfast prepared, its graphs"}
    assert {name for name, v in variants.items() if not v.graph} == own_graphs
    assert {name for name, v in variants.items() if v.apart} == {"timm max-autotune"}
    groups = {group: models.vit(batch=1, device="cuda", group=group, **TINY_VIT).variants for group in models.GROUPS}
    assert "timm compiled" not in groups["eager"] and "torchvision" not in groups["compiled"]
    assert set(groups["autotuned"]) == {"timm", "vitfast", "vitfast prepared", "timm max-autotune"}
    training = models.vit(batch=1, device="cuda", mode="training", **TINY_VIT)
    assert training.per_image == (True, False, False, False) and "vitfast prepared" not in training.variants


def test_results_of_graphs_are_written_over_by_the_next_call(monkeypatch):
    case = MODELS["vit"](dtype="fp32")
    given = draw(case)
    setting = steps.Setting("inference", "fp32", False, torch.device("cpu"), 2)
    name, options = TINY_VIT["model"], {"img_size": 32, "depth": 2}
    config = vitfast.config_for(name, **options)
    weights = rivals.random_weights(vitfast.create_model(name, **options).state_dict())
    memory = torch.empty(2, 1000)
    # as a graph does: the same memory at every call
    monkeypatch.setattr(torch, "compile", lambda f, dynamic, mode: lambda images: memory.copy_(f(images)))
    network = rivals.of_timm(name, options, config, weights)
    function = setting.compiled(network, "reduce-overhead")
    first = function(*given)
    kept = first.clone()
    assert not torch.equal(function(*draw(case, seed=1)), kept)
    assert torch.equal(first, kept)


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_gets_another_layout_or_its_logsumexp_counts_as_a_result(version, monkeypatch):
    def attend(q, k, v):
        assert q.shape == (2, 5, 3, 8)
        return torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_qkvpacked_func = lambda qkv: attend(*qkv.unbind(2))
    fake.cute = types.ModuleType("flash_attn.cute")
    fake.cute.flash_attn_func = lambda q, k, v: (attend(q, k, v), None)
    third = types.ModuleType("flash_attn_interface")
    third.flash_attn_func = attend
    for module in (fake, fake.cute, third):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    qkv = torch.randn(2, 5, 3, 3, 8)
    out = ops.packed_flash_attn(version)(qkv)
    torch.testing.assert_close(out, attend(*qkv.unbind(2)).flatten(2))
