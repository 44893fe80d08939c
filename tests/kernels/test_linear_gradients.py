"""Gradients of the kernels of linear layers and MLPs against fp64, by the rule that stock operators set."""

import itertools

import pytest
import torch
from attention_cases import DTYPES, draw, every_dtype
from linear_cases import (
    MECHANISMS,
    Steps,
    check_mlp,
    few_programs,
    grouped,
    judge_all,
    layer,
    mlp_by_kernels,
    mlp_layer,
    yardsticks,
)
from pairwise import product

from vitfast import reference
from vitfast.kernels.operands import Saved
from vitfast.kernels.triton import linear, linear_grads

every_mechanism = pytest.mark.parametrize("mechanism", MECHANISMS)
LINEAR_NAMES = ("x", "weight", "bias", "norm_weight", "norm_bias", "gamma")
LINEAR_CASES = {
    "plain": {},
    "norm": {"norm": "layer"},
    "rms": {"norm": "rms"},
    "act": {"norm": "layer", "act": "gelu"},
    "no bias": {"norm": "rms", "act": "silu", "bias": False},
    "gamma": {"gamma": True},
    "row_scale": {"row_scale": True, "act": "gelu_tanh"},
    "all": {"gamma": True, "row_scale": True, "norm": "layer", "residual": "same"},
    "autocast": {"norm": "layer", "wide_x": True, "act": "gelu"},
}


def linear_gradients(given, grad, mask=(True,) * 6):
    _, _, _, pre, branch = linear.forward(*grouped(given), True, config=MECHANISMS["pointers"])
    mask = [m and given[name] is not None for m, name in zip(mask, LINEAR_NAMES, strict=True)]
    *before, tail = grouped(given)
    with few_programs():
        return linear_grads.backward(grad, *before, Saved(None, None, pre, branch), tail, mask)


@every_dtype
@pytest.mark.parametrize("case", LINEAR_CASES)
def test_gradient_of_a_layer_is_wrong(case, dtype, device):
    given = layer(3, 23, 72, 64, dtype, device, **LINEAR_CASES[case])
    grad = draw(3, 23, 64, dtype=dtype, device=device, seed=12)
    others = {name: t for name, t in given.items() if name not in LINEAR_NAMES}

    def call(**tensors):
        high = {name: t.double() if torch.is_tensor(t) and tensors["x"].dtype is torch.float64 else t
                for name, t in others.items()}  # fmt: skip
        return reference.linear(**tensors, **high)

    steps = Steps(dtype)
    tensors = {name: given[name] for name in LINEAR_NAMES}
    beside = yardsticks(call, tensors, [grad], lambda **tensors: steps.linear(**tensors, **others))
    judge_all(LINEAR_NAMES, linear_gradients(given, grad), *(grads for _, grads in beside), dtype=dtype)


def test_gradient_that_nobody_needs_is_made_or_one_that_is_needed_is_not(device):
    for case in ("act", "gamma", "all"):
        given = layer(3, 5, 72, 64, torch.float32, device, **LINEAR_CASES[case])
        grad = draw(3, 5, 64, device=device, seed=12)
        whole = linear_gradients(given, grad)
        for only in [{i} for i in range(6)] + [{0, 3}, {1, 2}, {3, 4}, {2, 5}]:
            found = linear_gradients(given, grad, [i in only for i in range(6)])
            for i, (got, expected) in enumerate(zip(found, whole, strict=True)):
                assert (got is not None) == (i in only and expected is not None)
                assert got is None or torch.equal(got, expected)


MLP_CASES = {
    "plain": {},
    "scaled": {"gamma": True, "row_scale": True},
    "dropped": {"row_scale": True, "act": "gelu_tanh"},
    "quick": {"act": "quick_gelu", "norm": "rms"},
    "gated": {"act": "silu", "gated": True, "norm": "rms"},
    "autocast": {"gamma": True, "wide_x": True},
    "gated scaled": {"act": "gelu", "gated": True, "gamma": True, "row_scale": True},
}


@product(case=tuple(MLP_CASES), recompute=("none", "act", "fc1"), dtype=DTYPES)
def test_gradient_of_an_mlp_is_wrong(case, recompute, dtype, device):
    """Each mechanism with some of the cases."""
    turn = list(MLP_CASES).index(case) + ("none", "act", "fc1").index(recompute)
    config = list(MECHANISMS.values())[(turn + 3 * list(DTYPES.values()).index(dtype)) % len(MECHANISMS)]
    check_mlp(config, dtype, device, recompute, **MLP_CASES[case])


@every_mechanism
def test_mlp_is_wrong_in_one_way_to_share_the_work(mechanism, device):
    """The gradient behind the activation, with the weight as it lies: its rows are summed over."""
    check_mlp(MECHANISMS[mechanism], torch.float16, device, "act", size=(2, 33, 64, 192), gamma=True)
    check_mlp(MECHANISMS[mechanism], torch.float32, device, "fc1", size=(1, 67, 72, 197))


def test_gradient_of_an_mlp_that_nobody_needs(device):
    for case, recompute in itertools.product(("scaled", "gated scaled"), ("none", "act", "fc1")):
        tensors, others = mlp_layer(2, 3, 16, 32, torch.float32, device, **MLP_CASES[case])
        grad = draw(*tensors["x"].shape, device=device, seed=12)
        _, backward = mlp_by_kernels(MECHANISMS["pointers"], tensors, others, recompute)
        whole = backward(grad)
        for only in [{i} for i in range(8)] + [{0, 5}, {3, 4}, {5, 6, 7}]:
            for i, (got, expected) in enumerate(zip(backward(grad, [i in only for i in range(8)]), whole, strict=True)):
                assert (got is not None) == (i in only)
                assert got is None or torch.equal(got, expected)
