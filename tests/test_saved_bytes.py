"""How much memory a forward keeps for its backward: of an image through ViT-B/16, beside that of timm's model."""

import pytest
import timm
import torch

import vitfast

NAME = "vit_base_patch16_224"
# in 1e6 bytes, as CPUs keep them
MOST = {"none": 50.0, "act": 38.0, "fc1": 23.0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return vitfast.create_model(NAME, dtype=torch.bfloat16).train()


def saved_megabytes(model, images):
    """Each storage once, whoever saves it how often; those of parameters and buffers are there anyway."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(t):
        memory = t.untyped_storage()
        if memory.data_ptr() not in own:
            # the tensor as well: as long as it lives nobody else gets its address
            kept[memory.data_ptr()] = memory.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = model(images)
    assert out.requires_grad and kept
    return sum(size for size, _ in kept.values()) / 1e6


def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, 224, 224, generator=generator).bfloat16()


def test_plain_model_keeps_so_little_that_the_limits_say_nothing():
    assert 55.0 < saved_megabytes(timm.create_model(NAME).bfloat16().train(), images()) < 65.0


@pytest.mark.parametrize("mode", MOST)
def test_more_is_kept_for_the_backward_than_was_promised(mode, model):
    model.set_mlp_recompute(mode)
    assert all(block.mlp.recompute == mode for block in model.blocks)
    assert saved_megabytes(model, images()) <= MOST[mode]


def test_a_training_step_needs_seven_tenths_of_timms_memory(model):
    """Of 64 images in bf16: what the forward keeps, the weights and their gradients."""
    model.set_mlp_recompute("act")
    plain = timm.create_model(NAME).bfloat16().train()
    needs = []
    for each in (model, plain):
        weights = sum(p.nbytes for p in each.parameters()) / 1e6
        needs.append(64 * saved_megabytes(each, images()) + 2 * weights)
    assert needs[0] < 0.7 * needs[1], needs


def test_a_model_keeps_what_it_could_compute_again_unless_told_to():
    model = vitfast.create_model(NAME, depth=1, dtype=torch.bfloat16).train()
    assert model.blocks[0].mlp.recompute == "act"
    default = saved_megabytes(model, images())
    model.set_mlp_recompute("act")
    assert saved_megabytes(model, images()) == default


def test_recomputing_changes_a_gradient():
    """By more than another order of operations does: fp32, all parameters."""
    torch.manual_seed(0)
    model = vitfast.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=10).train()
    x, found = torch.randn(2, 3, 32, 32), {}
    for mode in MOST:
        model.set_mlp_recompute(mode)
        found[mode] = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    for mode in ("act", "fc1"):
        for (name, _), got, expected in zip(model.named_parameters(), found[mode], found["none"], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")  # noqa: B023
