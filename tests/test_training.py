"""What a training run does to a model: several processes, recomputation, loss scaling, frozen parts, copies, moves."""

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm_pair import build_pair, run
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import vitfast

RATES = {"drop_path_rate": 0.4, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "pos_drop_rate": 0.1, "drop_rate": 0.1}
FLAVOURS = ("vit", "dinov2_reg4", "siglip_gap", "test_vit3", "vit_pytorch")
every_flavour = pytest.mark.parametrize("flavour", FLAVOURS)


def model_and_images(flavour, batch=4, **changes):
    if flavour == "vit_pytorch":
        model = vitfast.ViT(
            image_size=32, patch_size=8, num_classes=10, dim=64, depth=2, heads=2, mlp_dim=128, dim_head=32,
            dropout=changes.get("proj_drop_rate", 0.0), emb_dropout=changes.get("pos_drop_rate", 0.0),
        )  # fmt: skip
        return model, torch.randn(batch, 3, 32, 32)
    _, ours, images = build_pair(flavour, batch=batch, **changes)
    return ours, images


def _train_one_process(rank, world, folder, flavour, settings):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.manual_seed(0)
    model, images = model_and_images(flavour)
    labels = torch.arange(4) % 10
    if settings["checkpointing"] and flavour != "vit_pytorch":
        model.set_grad_checkpointing()
    ddp = DistributedDataParallel(model, **settings["ddp"])
    optimizer = torch.optim.SGD(ddp.parameters(), lr=1e-2)
    mine = slice(2 * rank, 2 * rank + 2)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(ddp(images[mine]), labels[mine]).backward()
        optimizer.step()
    torch.save(model.state_dict(), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


DDP = {
    "default": {"checkpointing": False, "ddp": {}},
    "static graph, checkpointing": {"checkpointing": True, "ddp": {"static_graph": True}},
    "gradients as bucket views": {"checkpointing": False, "ddp": {"gradient_as_bucket_view": True}},
}


@pytest.mark.parametrize(
    ("flavour", "settings"),
    [
        ("vit", "static graph, checkpointing"), ("vit_pytorch", "default"),
        pytest.param("vit", "default", marks=pytest.mark.full),
        pytest.param("vit", "gradients as bucket views", marks=pytest.mark.full),
    ],
)  # fmt: skip
def test_two_processes_train_another_model_or_hang(tmp_path, flavour, settings):
    """A parameter without a gradient (DDP waits for it for ever), gradients reduced before they are complete."""
    mp.spawn(_train_one_process, (2, str(tmp_path), flavour, DDP[settings]), nprocs=2)
    torch.manual_seed(0)
    model, images = model_and_images(flavour)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    start = copy.deepcopy(model.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), torch.arange(4) % 10).backward()
        optimizer.step()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for name, expected in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        moved = (expected - start[name]).norm()
        assert (first[name] - expected).norm() <= 1e-2 * moved + 1e-7 * expected.norm(), name


@every_flavour
def test_block_in_users_own_checkpoint_draws_other_dropout(flavour):
    """torch.utils.checkpoint round a block: the recomputed forward has to draw what the first one drew."""
    model, images = model_and_images(flavour, **RATES)
    cotangent = torch.randn(4, 10)
    expected, grads = run(model, images, cotangent)
    for reentrant in (False, True):
        for block in model.blocks:
            original = block.forward
            block.forward = lambda *args, f=original, r=reentrant: torch.utils.checkpoint.checkpoint(
                f, *args, use_reentrant=r
            )
        # a patched block is not cut short, so the comparison is with one that computes all its tokens
        out, again = run(model, images, cotangent)
        for block in model.blocks:
            block.forward = lambda *args, b=block: type(b).forward(b, *args)
        whole, grads = run(model, images, cotangent)
        for block in model.blocks:
            del block.forward
        assert torch.equal(out, whole)
        for name, grad in grads.items():
            assert torch.equal(again[name], grad), name
    assert expected.shape == whole.shape


@pytest.mark.parametrize("flavour", ["vit", "dinov2_reg4", "vit_pytorch"])
def test_scaled_loss_with_an_inf_changes_the_weights(flavour):
    """GradScaler: a step whose gradients overflow is left out, and the scale shrinks; the next one is taken."""
    model, images = model_and_images(flavour)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    before = copy.deepcopy(model.state_dict())
    for factor, moves in ((float("inf"), False), (1.0, True)):
        scale = scaler.get_scale()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(images).float().square().mean() * 1e-4 * factor
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < scale) == (not moves)
        changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
        assert bool(changed) == moves
    assert all(value.isfinite().all() for value in model.state_dict().values())


def matmul_flops(run_it):
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, with_flops=True, acc_events=True) as profile:
        result = run_it()
    return result, sum(e.flops for e in profile.key_averages() if e.key in ("aten::mm", "aten::addmm", "aten::bmm"))


def flops(model, images):
    out, forward = matmul_flops(lambda: model(images))
    return forward, matmul_flops(lambda: out.sum().backward())[1]


@every_flavour
def test_linear_probe_pays_for_gradients_of_frozen_layers(flavour):
    """Only the head is trained: its backward may cost no more than its own matmuls, and keep no activations."""
    model, images = model_and_images(flavour, batch=8)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        out = model(images)
    own = 8 * model.embed_dim + 2 * model.head.weight.numel()
    assert sum(saved) <= own, f"{sum(saved)} numbers are kept, the head needs {own}"
    out.sum().backward()
    assert model.head.weight.grad.any()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight", "head.bias"]


def test_linear_probe_is_not_measurably_cheaper():
    """What a user would time: backward matmuls of a linear probe and of bias-only tuning against full training."""
    model, images = model_and_images("vit", batch=8)
    forward, full = flops(model, images)
    for p in model.parameters():
        p.requires_grad_(p.dim() == 1)
    biases = flops(model, images)[1]
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    probe = flops(model, images)[1]
    assert probe <= 2 * 8 * model.embed_dim * 10 < 1e-3 * full
    assert biases < 0.65 * full
    assert full >= 1.8 * forward


@pytest.mark.parametrize("trained", ["blocks.1.attn.qkv.weight", "blocks.0.norm1.bias", "blocks.0.mlp.fc1.bias",
                                     "pos_embed", "patch_embed.proj.weight", "cls_token"])  # fmt: skip
def test_single_trained_parameter_gets_another_gradient(trained):
    """Fine-tuning one part: frozen neighbours must not take its gradient away."""
    model, images = model_and_images("vit")
    cotangent = torch.randn(4, 10)
    expected = run(model, images, cotangent)[1][trained]
    for name, p in model.named_parameters():
        p.requires_grad_(name == trained)
    grads = run(model, images, cotangent)[1]
    assert [name for name, grad in grads.items() if grad is not None] == [trained]
    torch.testing.assert_close(grads[trained], expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@every_flavour
def test_gradients_accumulate_wrongly(flavour):
    """Two halves of a batch give the gradient of the whole; a second backward of one graph adds once more."""
    model, images = model_and_images(flavour)
    model.eval()
    cotangent = torch.randn(4, 10)
    _, expected = run(model, images, cotangent)
    expected = {name: grad.clone() for name, grad in expected.items()}
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 4)):
        out = model(images[part])
        out.backward(cotangent[part], retain_graph=True)
    for name, p in model.named_parameters():
        if "k_norm.bias" not in name:
            assert (p.grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name
    once = {name: p.grad.clone() for name, p in model.named_parameters()}
    out.backward(cotangent[part])
    second = {name: p.grad - once[name] for name, p in model.named_parameters()}
    _, grads = run(model, images[part], cotangent[part])
    for name in grads:
        assert (second[name] - grads[name]).norm() <= 1e-3 * grads[name].norm() + 1e-5, name


@every_flavour
def test_deterministic_algorithms_are_refused_or_vary(flavour):
    torch.use_deterministic_algorithms(True)
    try:
        model, images = model_and_images(flavour, **RATES)
        results = [run(model, images, torch.ones(4, 10)) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    for out, grads in results[1:]:
        assert torch.equal(out, results[0][0])
        assert all(torch.equal(grads[name], results[0][1][name]) for name in grads)


@every_flavour
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copy_shares_weights_or_is_another_model(flavour, way):
    model, images = model_and_images(flavour)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        if way == "deepcopy":
            other = copy.deepcopy(model)
        elif way == "pickle":
            other = pickle.loads(pickle.dumps(model))
        else:
            file = io.BytesIO()
            torch.save(model, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        assert type(other) is vitfast.ViT and other.config == model.config
        assert torch.equal(other(images), expected)
        for p in model.parameters():
            p.zero_()
        assert torch.equal(other(images), expected)


@every_flavour
def test_moved_model_keeps_old_weights(flavour):
    """A cached copy of a weight in the old dtype or on the old device."""
    model, images = model_and_images(flavour)
    model.eval()
    with torch.no_grad():
        expected = model(images)
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            out = copy.deepcopy(model).to(dtype)(images.to(dtype))
            assert out.dtype is dtype
            assert (out - expected).norm() <= 0.1 * expected.norm()
        fp64 = copy.deepcopy(model).double()(images.double())
        torch.testing.assert_close(copy.deepcopy(model).bfloat16().double()(images.double()).float(), fp64.float(),
                                   rtol=0.2, atol=0.2 * expected.abs().max().item())  # fmt: skip
        meta = copy.deepcopy(model).to("meta")
        assert meta(images.to("meta")).shape == expected.shape
        again = meta.to_empty(device="cpu")
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(images), expected)
        again.head.weight.data = torch.zeros_like(again.head.weight)
        again.blocks[0].attn.qkv.weight.data = again.blocks[0].attn.qkv.weight.data * 2
        assert torch.equal(again(images), again.head.bias.expand_as(expected))
        tied = copy.deepcopy(model).share_memory()
        assert torch.equal(tied(images), expected)


@every_flavour
def test_modes_that_forbid_gradients_change_the_result(flavour):
    model, images = model_and_images(flavour)
    model.eval()
    expected = model(images).detach()
    with torch.no_grad():
        assert torch.equal(model(images), expected)
    with torch.inference_mode():
        out = model(images)
        assert torch.equal(out, expected) and out.is_inference()
    assert not model(images.clone()).is_inference()
    with torch.inference_mode():
        fresh = torch.randn_like(images)
    if flavour == "vit_pytorch":
        # it cuts patches into a copy, which autograd may keep
        found, grads = run(model, fresh), run(model, fresh.clone())
        assert torch.equal(found[0], grads[0])
        assert all(torch.equal(found[1][name], grads[1][name]) for name in grads[1])
    else:
        with pytest.raises(RuntimeError, match="[Ii]nference"):
            model(fresh)


def test_plain_training_loop_does_not_learn():
    """The whole of it: a loader with an uneven last batch, autocast, clipping, a schedule, evaluation."""
    torch.manual_seed(0)
    model = vitfast.create_model("test_vit", img_size=32, num_classes=3, drop_path_rate=0.1)
    labels = torch.arange(90) % 3
    images = torch.randn(90, 3, 32, 32)
    images[torch.arange(90), labels] += 1.0
    loader = DataLoader(TensorDataset(images, labels), batch_size=32, shuffle=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8 * len(loader))
    for _ in range(8):
        for x, y in loader:
            with torch.autocast("cpu", torch.bfloat16):
                loss = torch.nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    assert accuracy > 0.9
