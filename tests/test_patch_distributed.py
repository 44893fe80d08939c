"""Patched models in what trains on several devices, and under activation checkpointing: the same steps as unpatched."""

import functools
import traceback

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from patched_families import (
    DRAWS,
    FAMILIES,
    Ops,
    Runs,
    blocks_of,
    build,
    every_family,
    images,
    level,
    one_family,
    step,
    whole,
)  # fmt: skip
from torch.distributed._composable.replicate import replicate
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper as wrappers
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FullyShardedDataParallel,
    MixedPrecision,
    MixedPrecisionPolicy,
    fully_shard,
)  # fmt: skip
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import vitfast
from vitfast.ops import _on_cpu

BF16 = torch.bfloat16


def ddp(model, blocks, **how):
    return DistributedDataParallel(model, **how)


def replicated(model, blocks):
    for block in blocks:
        replicate(block)
    return replicate(model)


def sharded(model, blocks, **how):
    """FSDP2 as its documentation shows it."""
    for block in blocks:
        fully_shard(block, **how)
    return fully_shard(model, **how)


def sharded_root(model, blocks):
    return fully_shard(model)


def sharded_parts(model, blocks):
    for block in blocks:
        fully_shard(block.attn)
        fully_shard(block.mlp)
    return fully_shard(model)


def checkpointed_and_sharded(model, blocks):
    kinds = tuple({type(block) for block in blocks})
    wrappers.apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, kinds))
    return sharded(model, [module for module in model.modules() if isinstance(module, wrappers.CheckpointWrapper)])


def compiled_and_sharded(model, blocks):
    model.runs = Runs("aot_eager")
    for block in blocks:
        block.compile(backend=model.runs)
    return sharded(model, blocks)


def fsdp1(model, blocks, **how):
    policy = ModuleWrapPolicy({type(block) for block in blocks})
    return FullyShardedDataParallel(model, auto_wrap_policy=policy, device_id=torch.device("cpu"), **how)


def tensor_parallel(model, blocks):
    mesh = init_device_mesh("cpu", (2,))
    for block in blocks:
        parallelize_module(block.mlp, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})
    return model


OFFLOAD = CPUOffloadPolicy(pin_memory=False)
WRAPS = {
    "DDP": ddp,
    "DDP, static graph": functools.partial(ddp, static_graph=True),
    "replicate": replicated,
    "fully_shard": sharded,
    "fully_shard, kept whole": functools.partial(sharded, reshard_after_forward=False),
    "fully_shard, offloaded": functools.partial(sharded, offload_policy=OFFLOAD),
    "fully_shard of the root": sharded_root,
    "fully_shard of parts": sharded_parts,
    "fully_shard, checkpointed": checkpointed_and_sharded,
    "fully_shard, compiled": compiled_and_sharded,
    "FSDP1": fsdp1,
    "FSDP1, own parameters": functools.partial(fsdp1, use_orig_params=True),
    "tensor parallel": tensor_parallel,
}
# what computes in bf16 -> the same in one dtype
IN_BF16 = {
    "fully_shard": functools.partial(sharded, mp_policy=MixedPrecisionPolicy(BF16, torch.float32)),
    "FSDP1, own parameters": functools.partial(fsdp1, use_orig_params=True, mixed_precision=MixedPrecision(BF16)),
}
# ops of a block some of whose modules have to run themselves; those of timm's names
SOME = {
    "fully_shard of parts": ["layer_norm"] * 2,
    "tensor parallel": ["linear", "attention_qkv", "linear", "layer_norm"],
}
CASES = [(family, wrap) for family in FAMILIES for wrap in WRAPS if family == "timm" or wrap not in SOME]
# what all families are wrapped in for `make test`
BOTH = ("DDP", "fully_shard")
ORDERS = ("patched, then wrapped", "wrapped, then patched")


def is_quick(family, wrap):
    return family == "timm" or wrap in BOTH


def classes(model):
    return [type(module) for module in model.modules()]


def wrapped(family, how, order=None, dtype=torch.float64):
    """(the model that is called, the report of `patch`)."""
    model = build(family, drop_path=0.2).to(dtype)
    report = vitfast.patch(model) if order == ORDERS[0] else None
    model = how(model, list(blocks_of(family, model)))
    if order == ORDERS[1]:
        before = classes(model)
        report = vitfast.patch(model)
        assert classes(model) == before
    return model, report


def farthest(found, expected):
    """Of `step`: the largest relative difference of output and gradients, and where it is."""
    assert found[1].keys() == expected[1].keys()
    pairs = {"output": (found[0], expected[0])} | {n: (found[1][n], grad) for n, grad in expected[1].items()}
    biggest = max(grad.norm() for grad in expected[1].values())
    return max((((a - b).norm() / max(b.norm(), 1e-6 * biggest)).item(), name) for name, (a, b) in pairs.items())


def compared(family, wrap, order, x):
    """A step in fp64 of the patched model, then unpatched, next to one that never was patched."""
    unpatched, _ = wrapped(family, WRAPS[wrap])
    expected = step(unpatched, unpatched, x)
    model, report = wrapped(family, WRAPS[wrap], order)
    before = classes(model)
    if "compiled" in wrap:
        # Dynamo compiles nothing under a mode that looks at operators
        model(x)
        names = ["patch_embed"] * FAMILIES[family].stem + model.runs.ran
    else:
        with Ops() as ran:
            model(x)
        names = ran.names
    found = step(model, model, x)
    rows = vitfast.explain(model).rows
    vitfast.unpatch(model)
    return {
        "far": farthest(found, expected),
        "ops": names,
        "fused": sorted({part.kind for part in report.fused}) if order == ORDERS[1] else None,
        "explained": sorted({(row.path, row.reason) for row in rows if not row.path.startswith("op ")}),
        "unpatched": farthest(step(model, model, x), expected)[0],
        "classes": classes(model) == before,
    }


def level_in_bf16(family, wrap, order, x):
    plain, _ = wrapped(family, WRAPS[wrap])
    low, _ = wrapped(family, IN_BF16[wrap], dtype=torch.float32)
    model, _ = wrapped(family, IN_BF16[wrap], order, dtype=torch.float32)
    ref, low = step(plain, plain, x), step(low, low, x.float())
    with Ops() as ran:
        found = step(model, model, x.float())
    level(found, low, ref)
    return [name for name in ran.names if "backward" not in name]


def trainer(family, patched, seed=0):
    """(model, optimizer), sharded."""
    model = build(family).double()
    torch.manual_seed(seed)
    for p in model.parameters():
        p.data += 0.01 * torch.randn_like(p)
    sharded(model, blocks_of(family, model))
    if patched:
        vitfast.patch(model).require("attention", "norm", "mlp")
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def flat(state):
    return {str(path): whole(leaf) for path, leaf in torch.utils._pytree.tree_leaves_with_path(state)}


def resumed(family, patched, x, folder):
    """A run saved by a model that is `patched` or not, and taken up by one that is not, or is."""
    first, second = trainer(family, patched), trainer(family, not patched, seed=1)
    train(*first, x)
    train(*second, x, steps=1)
    saved, state = (dict(zip(("model", "optimizer"), get_state_dict(*run), strict=True)) for run in (first, second))
    dcp.save(saved, checkpoint_id=folder)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(*second, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    one, other = (flat(get_state_dict(*run)) for run in (first, second))
    same = one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )
    for run in (first, second):
        train(*run, x, steps=1)
    one, other = (flat(get_model_state_dict(run[0])) for run in (first, second))
    return {
        "same": same,
        "keys": saved["model"].keys() == build(family).state_dict().keys(),
        "far": max(((one[name] - other[name]).norm() / one[name].norm()).item() for name in one),
    }


def work(rank, folder, chosen):
    torch.set_num_threads(1)
    _on_cpu.HOST_BOUND = _on_cpu.TRAINING_BOUND = 0
    _on_cpu.WEIGHTS_IN_HALF, _on_cpu.LIMITS = False, dict.fromkeys(_on_cpu.LIMITS, 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    x = images(4).double()
    mine, found = x[2 * rank : 2 * rank + 2], {}
    checks = {
        (family, wrap, order): functools.partial(
            # ranks of tensor parallelism have the same images
            compared,
            family,
            wrap,
            order,
            x[:2] if wrap == "tensor parallel" else mine,
        )
        for family, wrap in chosen
        for order in ORDERS
    }
    checks |= {
        (family, "bf16", wrap, order): functools.partial(level_in_bf16, family, wrap, order, mine)
        for family in {family: 0 for family, wrap in chosen if wrap == "DDP, static graph"}
        for wrap in IN_BF16
        for order in ORDERS
    }
    checks |= {
        (family, "resumed", patched): functools.partial(resumed, family, patched, mine, f"{folder}/{family}{patched}")
        for family in {family: 0 for family, wrap in chosen if wrap == "DDP, static graph"}
        for patched in (True, False)
    }
    for key, check in checks.items():
        try:
            found[key] = check()
        except Exception:
            found[key] = traceback.format_exc()
    torch.save(found, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory, request):
    """What each check found in each of two processes, which are started once for all of them."""
    folder = tmp_path_factory.mktemp("processes")
    chosen = [case for case in CASES if request.config.getoption("--all") or is_quick(*case)]
    mp.spawn(work, (str(folder), chosen), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def of(found, *key):
    for results in found:
        assert not isinstance(results[key], str), results[key]
    return [results[key] for results in found]


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("family", "wrap"), [pytest.param(*case, marks=[pytest.mark.full] * (not is_quick(*case))) for case in CASES]
)
def test_wrapped_model_trains_otherwise_or_without_ops(found, family, wrap, order):
    """A shard taken for a weight, a gradient that is not reduced, a hook of the wrapper that is not run."""
    for result in of(found, family, wrap, order):
        assert result["far"][0] < 1e-10, result["far"]
        expected = ["patch_embed", *SOME[wrap] * 2] if wrap in SOME else FAMILIES[family].all_ops(stem=True)
        assert result["ops"] == expected
        assert result["unpatched"] == 0.0
        assert result["classes"]
        said = [row for row in result["explained"] if "Sequential, not Conv2d" not in row[1]]
        if wrap not in SOME:
            assert not said
            kinds = ["attention", "mlp", "norm", "patch_embed"]
            assert result["fused"] in (None, kinds[: 3 + FAMILIES[family].stem])
        else:
            assert said and all("hooks" in reason or "does not know" in reason for _, reason in said)


@pytest.mark.slow
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("wrap", IN_BF16)
@one_family
def test_mixed_precision_of_the_wrapper_is_less_exact(found, family, wrap, order):
    for ops in of(found, family, "bf16", wrap, order):
        assert ops == FAMILIES[family].all_ops(stem=True)


@pytest.mark.slow
@pytest.mark.parametrize("patched", [True, False], ids=["by a patched model", "by an unpatched model"])
@one_family
def test_sharded_checkpoint_is_another_run(found, family, patched):
    """Saved in shards, with the optimizer's state, and resumed by a model in the other state."""
    for result in of(found, family, "resumed", patched):
        assert result["keys"] and result["same"]
        assert result["far"] < 1e-10


RATES = DRAWS | {"attention_dropout": 0.1}


def by_function(model, family, reentrant):
    for block in blocks_of(family, model):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=reentrant)


def by_wrapper(model, family, reentrant):
    kinds = tuple(type(block) for block in blocks_of(family, model))
    kind = wrappers.CheckpointImpl.REENTRANT if reentrant else wrappers.CheckpointImpl.NO_REENTRANT
    wrap = functools.partial(wrappers.checkpoint_wrapper, checkpoint_impl=kind)
    wrappers.apply_activation_checkpointing(model, wrap, check_fn=lambda module: isinstance(module, kinds))


@pytest.mark.parametrize("reentrant", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("way", [by_function, by_wrapper])
@every_family
def test_checkpointed_block_draws_another_mask(family, way, reentrant):
    """What is computed again in the backward has to drop what was dropped in the forward, bit for bit."""
    model = build(family, **RATES)
    vitfast.patch(model)
    # autograd of the reentrant kind wants an input with a gradient
    x = images().requires_grad_()
    expected = step(model, model, x)
    assert (step(model, model, x, seed=8)[0] - expected[0]).norm() > 0.1 * expected[0].norm()
    way(model, family, reentrant)
    if way is by_wrapper:
        # the other order
        vitfast.unpatch(model)
        vitfast.patch(model).require("attention", "norm", "mlp")
    with Ops() as forward:
        model(x)
    with Ops() as both:
        out, grads = step(model, model, x)
    assert [name for name in both.names if "backward" not in name] == 2 * forward.names
    assert torch.equal(out, expected[0])
    for name, grad in grads.items():
        assert torch.equal(grad, expected[1][name.replace("_checkpoint_wrapped_module.", "")]), name
