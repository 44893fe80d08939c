"""A prepared model in a CUDA graph, and at real size."""

import pytest
import torch
from prepared_cases import model_of

import vitfast
from vitfast.check.acceptance import accept_model
from vitfast.choose import dispatch

# of a block: what users get, and deferred biases
FORMS = "auto", "kernel"
every_form = pytest.mark.parametrize("form", FORMS)


@every_form
def test_graph_of_a_prepared_model_replays_something_else(form):
    prepared = vitfast.prepare(model_of(torch.bfloat16, "cuda", layer_scale=0.5))
    images = torch.randn(2, 3, 24, 24, device="cuda", dtype=torch.bfloat16)
    with dispatch.backend(form, op="prepared_block"):
        expected = prepared(images)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = prepared(images)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.parametrize("variant", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
@pytest.mark.parametrize("batch", [1, 64])
@every_form
def test_prepared_model_of_real_size_is_less_exact_than_the_model(variant, batch, form):
    torch.manual_seed(0)
    model = vitfast.create_model(variant).eval().to("cuda", torch.bfloat16)
    images = torch.randn(batch, 3, 224, 224, device="cuda", dtype=torch.bfloat16)
    wide = vitfast.create_model(variant).eval().to("cuda", torch.float64)
    wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    with torch.no_grad(), dispatch.backend("stock"):
        ref, low = wide.forward_features(images.double()), model.forward_features(images)
    with dispatch.backend(form, op="prepared_block"):
        accept_model(vitfast.prepare(model).forward_features(images), ref, low, what=variant)
