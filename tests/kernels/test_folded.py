"""A prepared model through the kernels: norms and LayerScale in the weights, statistics from product to product."""

import pytest
import torch
from attention_cases import every_dtype
from launches import Launches

import vitfast
from vitfast import dispatch
from vitfast.acceptance import accept_model
from vitfast.kernels import attention, layer_norm, linear
from vitfast.kernels.tuning import Product

CONFIGS = {
    "plain": {},
    "registers and LayerScale": {"register_tokens": 3, "layer_scale": 0.5},
    "mean of all tokens, tanh": {"pool": "mean", "activation": "gelu_tanh"},
    "qk norm, RMS": {"qk_norm": True, "norm": "rms"},
    "gated": {"mlp": "swiglu_packed", "activation": "silu"},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "norm inside of the MLP": {"mlp_norm": True},
}
SIZES = {"image_size": 24, "patch_size": 8, "dim": 64, "depth": 3, "heads": 2, "mlp_dim": 128, "num_classes": 7}


def model_of(dtype, device, **config):
    torch.manual_seed(0)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**SIZES | config)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(std=0.3 if p.dim() < 2 else p[0].numel() ** -0.5)
            if "norm" in name and name.endswith("weight"):
                p += 1.0
    return model.to(device, dtype)


@every_dtype
@pytest.mark.parametrize("config", CONFIGS)
def test_prepared_model_is_less_exact_than_the_model(config, dtype, device):
    model = model_of(dtype, device, **CONFIGS[config])
    # the error of few images' logits is luck: of 3 images equally exact models differ by 0.7 to 1.5 times
    images = torch.randn(24, 3, 24, 24, device=device).to(dtype)
    wide = model_of(torch.float64, "cpu", **CONFIGS[config])
    wide.load_state_dict({name: t.double().cpu() for name, t in model.state_dict().items()})
    with torch.no_grad(), dispatch.backend("stock"):
        ref, low = wide(images.double().cpu()).to(device), model(images)
    prepared = vitfast.prepare(model)
    out = prepared(images)
    accept_model(out, ref, low, what=config)
    with torch.no_grad(), dispatch.backend("stock"):
        # features of all tokens, and the ops that take the kernels' place
        accept_model(prepared(images), ref, low, what="stock operators")
        ref, low = wide.forward_features(images.double().cpu()).to(device), model.forward_features(images)
    accept_model(prepared.forward_features(images), ref, low, what="features")


def test_a_block_is_more_than_five_kernels(monkeypatch, device):
    """After the first norm, whose rows no product wrote."""
    prepared = vitfast.prepare(model_of(torch.float16, device, depth=2, pool="mean"))
    images = torch.randn(2, 3, 24, 24, device=device).to(torch.float16)
    launches = Launches(monkeypatch, attention, layer_norm, linear)
    prepared.forward_features(images)
    kernels = ["attention" if name.startswith("forward_") else name for name in launches.names]
    assert kernels == ["norm_forward", *["product", "attention", "product", "product", "product"] * 2]


def test_statistics_that_travel_are_those_of_other_rows(device):
    """Each row's mean and distance are in the pieces, and the next product reads them as it would compute them."""
    torch.manual_seed(1)
    x, residual = (torch.randn(2, 33, 64, device=device).half() for _ in range(2))
    residual += 30 * torch.randn(2, 33, 1, device=device).half()
    w1, w2 = (torch.randn(64, 64, device=device).half() / 8 for _ in range(2))
    out, pieces = linear.forward_with_pieces(x, w1, None, residual)
    count, _, rows = pieces.shape
    assert rows == 66 and out.dtype is torch.float16
    parts = out.double().view(66, count, -1)
    torch.testing.assert_close(pieces[:, 0].double().T, parts.mean(-1), rtol=1e-5, atol=1e-5)
    squares = (parts - parts.mean(-1, keepdim=True)).square().sum(-1)
    torch.testing.assert_close(pieces[:, 1].double().T, squares, rtol=1e-4, atol=1e-4)
    sums, bias = w2.float().sum(1), torch.zeros(64, device=device)
    with_pieces, without = (
        linear.folded_forward(out, w2, sums, bias, "layer", 1e-6, "none", each) for each in (pieces, None)
    )
    ref = torch.nn.functional.layer_norm(out.double(), (64,)) @ w2.double().T
    for found in (with_pieces, without):
        torch.testing.assert_close(found.double(), ref, rtol=0, atol=4e-3 * ref.abs().max().item())


@pytest.mark.parametrize("N", [64, 192])
def test_statistics_are_written_past_their_end(N, monkeypatch, device):
    """By the last tile's second part, where the first one ends the rows: into memory of somebody else."""
    made, empty = [], torch.empty

    def with_more(*shape, **how):
        shape = torch.Size(shape[0] if isinstance(shape[0], (tuple, list)) else shape)
        made.append((torch.full((shape.numel() + 4096,), 7, **how), shape.numel()))
        return made[-1][0][: shape.numel()].view(shape)

    x, weight, residual = (torch.randn(n, k, device=device).half() for n, k in ((130, 64), (N, 64), (130, N)))
    config = Product("tiles", 128, 128, 64, warps=8, stages=4, parts=2)
    monkeypatch.setattr(torch, "empty", with_more)
    _, pieces = linear.forward_with_pieces(x, weight, None, residual, config)
    monkeypatch.setattr(torch, "empty", empty)
    assert pieces.shape == (N // 64, 2, 130) and made
    assert all((memory[numbers:] == 7).all() for memory, numbers in made)


def test_prepared_model_takes_images_from_another_device(device):
    prepared = vitfast.prepare(model_of(torch.float16, device))
    with pytest.raises(ValueError, match="images must be on the"):
        prepared(torch.randn(1, 3, 24, 24, device="meta", dtype=torch.float16))
    model = model_of(torch.float16, device)
    prepared = vitfast.prepare(model)
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight.add_(1)
    with pytest.raises(RuntimeError, match="was written to after vitfast.prepare"):
        prepared(torch.randn(1, 3, 24, 24, device=device, dtype=torch.float16))
