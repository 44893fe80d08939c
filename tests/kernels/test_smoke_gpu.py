"""Each kernel once, in the forms that models use, and first whole models: what `make gpu RUN=check` runs on a new card.

No test here is of something that others in this folder do not test more of. All take about a minute with a process for
almost every core, most of which kernels are compiled in.
"""

import pytest
import test_attention_gpu
import test_gpu_block_gpu
import test_layer_norm
import test_linear_gpu
import test_mlp
import test_patch_embed_gpu
import torch
import torch.nn.functional as F
from attention_cases import BACKWARD, FORWARD, PAIRS, check, every_dtype
from launches import sanitized, why_no_sanitizer
from linear_cases import MECHANISMS, check_forward, check_mlp, layer

import vitfast
from vitfast.choose import builtin, dispatch

MODELS = ("vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224")
# gradients from the back of the model to its front
WATCHED = ("blocks.11.mlp.fc2.weight", "blocks.0.attn.qkv.weight", "patch_embed.proj.weight")


# what users get, and then kernels wherever they can run, as in all other tests of this folder
@pytest.fixture(params=["built in", "kernels"])
def choice(request, monkeypatch):
    monkeypatch.setattr(builtin, "EVERYWHERE", request.param == "kernels")


@test_gpu_block_gpu.every_form
@pytest.mark.parametrize("batch", [64, 256])
@pytest.mark.parametrize("variant", MODELS)
def test_prepared_model_is_less_exact_than_the_model(variant, batch, choice, form):
    test_gpu_block_gpu.test_prepared_model_of_real_size_is_less_exact_than_the_model(variant, batch, form)


def step(model, images):
    """Logits and gradients of one training step."""
    logits = model(images)
    F.cross_entropy(logits.float(), torch.arange(len(images), device=images.device)).backward()
    parameters = dict(model.named_parameters())
    return {"logits": logits.detach()} | {name: parameters[name].grad for name in WATCHED}


@pytest.mark.parametrize("variant", MODELS)
def test_training_step_is_less_exact_than_with_stock_operators(variant, device, choice):
    """In bf16, with 64 images; what is true is fp32."""
    torch.manual_seed(0)
    wide = vitfast.create_model(variant).train().to(device)
    images = torch.randn(64, 3, 224, 224, device=device).bfloat16()
    wide.load_state_dict({name: t.bfloat16().float() for name, t in wide.state_dict().items()})
    low, ours = (vitfast.create_model(variant).train().to(device, torch.bfloat16) for _ in range(2))
    for model in (low, ours):
        model.load_state_dict(wide.state_dict())
    with dispatch.backend("stock"):
        exact, stock = step(wide, images.float()), step(low, images)
    found = step(ours, images)
    for name, truth in exact.items():
        errors = [(t.double() - truth).square().mean().sqrt() for t in (found[name], stock[name])]
        assert errors[0] <= 1.5 * errors[1], (name, errors)


REPLAYED = {
    "attention": (test_attention_gpu, {"N": 197}), "linear and MLP": (test_linear_gpu, {"B": 8}),
    "patch embedding": (test_patch_embed_gpu, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REPLAYED)
def test_replayed_graph_computes_something_else(name, device):
    module, how = REPLAYED[name]
    module.test_replayed_graph_computes_something_else(**how, device=device)


def test_replayed_graph_of_a_prepared_model_computes_something_else():
    for form in test_gpu_block_gpu.FORMS:
        test_gpu_block_gpu.test_graph_of_a_prepared_model_replays_something_else(form)


@pytest.mark.parametrize("name", REPLAYED)
def test_kernel_runs_before_what_its_stream_waits_for(name, device):
    module, how = REPLAYED[name]
    module.test_kernel_runs_before_what_its_stream_waits_for(**how, device=device)


@every_dtype
@pytest.mark.parametrize("forward, backward", [*PAIRS, ("short", "delta first")])
def test_attention_is_wrong(forward, backward, dtype, device):
    check(dtype, 64, 197, 197, forward=FORWARD[forward], backward=BACKWARD[backward], device=device)


def test_attention_of_cudnn_leaves_another_lse(device):
    test_attention_gpu.test_attention_of_cudnn_leaves_another_lse(64, 12, 197, 64, device)


@every_dtype
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_linear_layer_is_wrong(mechanism, dtype, device):
    given = layer(3, 197, 384, 1152, dtype, device, norm="layer", act="gelu", gamma=True, residual="same")
    check_forward(MECHANISMS[mechanism], given, saves=True)


@every_dtype
def test_gradient_of_an_mlp_is_wrong(dtype, device):
    check_mlp(None, dtype, device, "act", size=(3, 197, 384, 1536), gamma=True, row_scale=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", test_mlp.CONFIGS)
def test_whole_mlp_is_wrong(config, dtype, device):
    test_mlp.test_part_of_a_row_or_of_the_hidden_numbers_is_lost(192, 768, config, dtype, device)


@every_dtype
@pytest.mark.parametrize("of_sum", [False, True])
def test_layer_norm_is_wrong(of_sum, dtype, device):
    test_layer_norm.check(test_layer_norm.parts(768, dtype, device, "layer", of_sum=of_sum), "layer")


@every_dtype
def test_patch_embedding_is_wrong(dtype, device, monkeypatch):
    # stock products of fp32 in fp32: TF32 is no yardstick
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    test_patch_embed_gpu.test_tokens_of_a_real_model_are_wrong(1, 224, 16, 192, dtype, device)


# widths that tiles of columns overhang, with so many rows that programs take several tiles
SANITIZED = """
import torch
from vitfast.kernels import linear
for rows, N in ((9456, 192), (22656, 384), (8000, 1152)):
    x, weight, residual = (torch.randn(n, k, device="cuda").bfloat16() for n, k in ((rows, N), (N, N), (rows, N)))
    linear.forward_with_pieces(x, weight, None, residual)
torch.cuda.synchronize()
"""


@pytest.mark.alone
def test_statistics_are_written_past_their_end():
    if why := why_no_sanitizer():
        pytest.skip(why)
    sanitized("memcheck", SANITIZED)
