"""A whole model through the kernels, as compilers, exporters, autocast and DDP use it."""

import pytest
import torch
from attention_cases import INTERPRETED

import vitfast
from vitfast.choose import dispatch


def model_of(device, **config):
    torch.manual_seed(0)
    sizes = {"image_size": 16, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "mlp_dim": 64, "num_classes": 5}
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**sizes | {"layer_scale": 0.5, "register_tokens": 1} | config))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.to(device)


def step(model, images, dtype=None):
    model.zero_grad()
    with torch.autocast(images.device.type, dtype, enabled=dtype is not None):
        out = model(images)
    out.float().square().sum().backward()
    return {"out": out.detach().float()} | {name: p.grad.clone() for name, p in model.named_parameters()}


def same(found, expected, rtol):
    for name, t in expected.items():
        found_t = found[name]
        assert found_t.dtype == t.dtype, name
        atol = rtol * t.abs().max().item()
        torch.testing.assert_close(found_t, t, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
def test_compiled_graph_is_another_model(autocast, device):
    """Or not one graph: forward and backward of what the compiler is told the ops do."""
    model, images = model_of(device).train(), torch.randn(3, 3, 16, 16, device=device)
    eager = step(model, images, autocast)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.zero_grad()
    with torch.autocast(device.type, autocast, enabled=autocast is not None):
        out = compiled(images)
    out.float().square().sum().backward()
    found = {"out": out.detach().float()} | {name: p.grad.clone() for name, p in model.named_parameters()}
    same(found, eager, 1e-6 if autocast is None else 2e-3)


def test_exported_model_computes_something_else(device):
    model = model_of(device).eval()
    batch = torch.export.Dim("batch", min=1, max=64)
    images = torch.randn(3, 3, 16, 16, device=device)
    with torch.no_grad():
        program = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        more = torch.randn(5, 3, 16, 16, device=device)
        torch.testing.assert_close(program.module()(more), model(more), rtol=1e-5, atol=1e-5)
    called = {str(node.target) for node in program.graph.nodes if "vitfast" in str(node.target)}
    assert {"vitfast.linear.default", "vitfast.mlp.default"} <= called


def test_autocast_rounds_where_stock_does_not(device):
    """fp16 beside an fp32 residual stream: as near to fp32 as stock operators under autocast are."""
    model, images = model_of(device).train(), torch.randn(3, 3, 16, 16, device=device)
    with dispatch.backend("stock"):
        exact, stock = step(model, images), step(model, images, torch.float16)
    found = step(model, images, torch.float16)
    for name, truth in exact.items():
        assert found[name].dtype == stock[name].dtype, name
        errors = [(t - truth).double().square().mean().sqrt() for t in (found[name], stock[name])]
        floor = 2e-3 * truth.double().square().mean().sqrt()
        assert errors[0] <= 1.5 * errors[1] + floor, (name, errors)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")
def test_ddp_loses_a_gradient(device, tmp_path):
    model, images = model_of(device).train(), torch.randn(3, 3, 16, 16, device=device)
    expected = step(model, images)
    torch.distributed.init_process_group(
        "gloo" if INTERPRETED else "nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        found = {name.removeprefix("module."): t for name, t in step(parallel, images).items()}
    finally:
        torch.distributed.destroy_process_group()
    same(found, expected, 1e-6)
