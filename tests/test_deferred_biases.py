"""Prepared models whose blocks defer biases, by stock operators on the CPU: their algebra in fp32 and bf16."""

import deferred_biases
import pytest
import torch
from deferred_biases import forms  # noqa: F401
from prepared_cases import CONFIGS

CPU = torch.device("cpu")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@every_dtype
@pytest.mark.parametrize("config", CONFIGS)
def test_deferred_biases_are_lost_or_added_twice(config, dtype, forms):  # noqa: F811
    deferred_biases.results(config, dtype, CPU, forms)


@every_dtype
@pytest.mark.parametrize("what", ["masked", "intermediates", "deep", "mixed", "aligned_biases", "huge_biases"])
def test_deferred_biases_change_a_model(what, dtype, forms):  # noqa: F811
    getattr(deferred_biases, what)(dtype, CPU, forms)


def test_bias_that_its_product_takes_away_is_deferred(forms, monkeypatch):  # noqa: F811
    deferred_biases.cancelled_biases(torch.bfloat16, CPU, forms, monkeypatch)


def test_biases_that_products_take_away_pile_up(forms):  # noqa: F811
    deferred_biases.small_cancelled_biases(torch.bfloat16, CPU, forms)


@every_dtype
def test_hook_of_a_prepared_part_is_not_called(dtype, forms):  # noqa: F811
    deferred_biases.hooked(dtype, CPU, forms)


@every_dtype
@pytest.mark.parametrize("what", ["foreign_tensors", "replaced_stem", "strange_calls"])
def test_tensor_of_somebody_else_is_written_to(what, dtype, forms):  # noqa: F811
    getattr(deferred_biases, what)(dtype, CPU, forms)
