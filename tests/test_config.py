"""ViTConfig: what it refuses and how it says so, what it derives, and that it cannot change afterwards."""

import dataclasses
import json
import math

import pytest

from vitfast import VARIANTS, ViTConfig

DEFAULTS = ViTConfig()
COUNTS = ("channels", "dim", "heads", "head_dim", "mlp_dim")  # at least 1
NUMBERS = ("num_classes", "depth", "register_tokens")  # at least 0
SWITCHES = (
    "qkv_bias", "proj_bias", "out_proj", "qk_norm", "attn_norm", "mlp_norm", "class_token", "distillation_token",
    "pre_norm", "patch_norm", "final_norm", "pool_prefix", "norm_after_pool", "input_norm", "dynamic_image_size",
    "dynamic_pad",
)  # fmt: skip
CHOICES = {
    "mlp": ("mlp", "swiglu_packed", "swiglu"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
    "norm": ("layer", "rms"),
    "pool": ("token", "mean", "map", "none"),
    "pos_embed": ("all", "patches", "none"),
}
RATES = ("emb_dropout", "attn_dropout", "proj_dropout", "mlp_dropout", "head_dropout", "drop_path")
SIZES = ("image_size", "patch_size")

BAD = [
    *((field, value, TypeError, "an int of at least 1") for field in COUNTS for value in (2.0, "8", True, (4,))),
    *((field, value, ValueError, "an int of at least 1") for field in COUNTS for value in (0, -3)),
    *((field, value, TypeError, "an int of at least 0") for field in NUMBERS for value in (1.5, None, "2", False)),
    *((field, -1, ValueError, "an int of at least 0") for field in NUMBERS),
    *((field, value, TypeError, "a bool") for field in SWITCHES for value in (1, 0, "yes", 0.0)),
    *((field, None, TypeError, "a bool") for field in SWITCHES if field != "norm_after_pool"),
    *((field, value, ValueError, "one of") for field in CHOICES for value in ("other", "", None, 3, "LAYER")),
    *((field, value, TypeError, "a number in [0, 1)") for field in RATES for value in ("0.1", None, True, math.nan)),
    *((field, value, ValueError, "a number in [0, 1)") for field in RATES for value in (1, 1.0, -0.1, 30)),
    *(("norm_eps", value, TypeError, "a number above 0") for value in ("1e-6", None, True, math.inf, math.nan)),
    *(("norm_eps", value, ValueError, "a number above 0") for value in (0, 0.0, -1e-6)),
    *(("layer_scale", value, TypeError, "None or a number other than 0") for value in ("1e-5", True, math.nan)),
    *(("layer_scale", value, ValueError, "None or a number other than 0") for value in (0, 0.0)),
    *((field, value, TypeError, "an int or a pair of ints") for field in SIZES
      for value in (16.0, "16", None, True, (16,), (16, 16, 16), (16, 16.0), (True, 16), {16: 16})),
    *((field, value, ValueError, "at least 1 in both directions") for field in SIZES
      for value in (0, -16, (16, 0), [0, 16])),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value", "error", "rule"), BAD, ids=lambda v: getattr(v, "__name__", repr(v)))
def test_bad_value_is_accepted_or_not_named(field, value, error, rule):
    """A value that fails later, deep in a forward; an error without the field, the rule or the value."""
    with pytest.raises(error) as raised:
        ViTConfig(**{field: value})
    said = str(raised.value)
    assert said.startswith(f"ViTConfig.{field} must be ") and rule in said and said.endswith(f"got {value!r}")
    for choice in CHOICES.get(field, ()):
        assert repr(choice) in said


def test_a_field_is_not_checked():
    """A field that is added to the config and not to the table above."""
    assert {field for field, *_ in BAD} == {field.name for field in dataclasses.fields(ViTConfig)}


COMBINATIONS = [
    ("image_size", "a multiple of patch_size=(16, 16)", {"image_size": 100}, (100, 100)),
    ("image_size", "a multiple of patch_size=(16, 8)", {"image_size": (96, 100), "patch_size": (16, 8)}, (96, 100)),
    ("image_size", "at least one patch_size=(16, 16)", {"image_size": (8, 32), "dynamic_image_size": True}, (8, 32)),
    ("dim", "a multiple of heads=5 when head_dim is not given", {"dim": 64, "heads": 5}, 64),
    ("pool", "other than 'token' when class_token is False", {"class_token": False}, "token"),
    ("distillation_token", "False without a class_token",
     {"distillation_token": True, "class_token": False, "pool": "mean"}, True),
    ("pool", "'token' with a distillation_token", {"distillation_token": True, "pool": "mean"}, "mean"),
    ("register_tokens", "0 with a distillation_token", {"distillation_token": True, "register_tokens": 2}, 2),
    ("mlp_dim", "even for mlp='swiglu_packed'", {"mlp": "swiglu_packed", "mlp_dim": 301}, 301),
    ("heads", "a divisor of dim=64 for pool='map'", {"pool": "map", "dim": 64, "heads": 3, "head_dim": 16}, 3),
    ("dynamic_pad", "False unless dynamic_image_size is True", {"dynamic_pad": True}, True),
    ("out_proj", "True unless heads * head_dim == dim", {"out_proj": False, "dim": 64, "heads": 2, "head_dim": 16},
     False),
    ("norm", "'layer' with input_norm", {"input_norm": True, "norm": "rms"}, "rms"),
    ("register_tokens", "0 with input_norm", {"input_norm": True, "register_tokens": 1}, 1),
    ("distillation_token", "False with input_norm", {"input_norm": True, "distillation_token": True}, True),
    ("pre_norm", "False with input_norm", {"input_norm": True, "pre_norm": True}, True),
    ("patch_norm", "False with input_norm", {"input_norm": True, "patch_norm": True}, True),
    ("pos_embed", "'all' with input_norm", {"input_norm": True, "pos_embed": "none"}, "none"),
    ("dynamic_pad", "False with input_norm", {"input_norm": True, "dynamic_image_size": True, "dynamic_pad": True},
     True),
]  # fmt: skip


@pytest.mark.parametrize(("field", "rule", "fields", "value"), COMBINATIONS, ids=[str(c[2]) for c in COMBINATIONS])
def test_fields_that_contradict_each_other_are_accepted(field, rule, fields, value):
    """Two fields, each right by itself, of which the model would ignore one."""
    with pytest.raises(ValueError) as raised:
        ViTConfig(**fields)
    assert str(raised.value) == f"ViTConfig.{field} must be {rule}, got {value!r}"
    with pytest.raises(ValueError, match=f"ViTConfig.{field} "):
        DEFAULTS.replace(**{"head_dim": None, **fields})


@pytest.mark.parametrize(
    ("fields", "derived"),
    [
        ({}, {"head_dim": 64, "mlp_dim": 3072, "norm_after_pool": False, "image_size": (224, 224)}),
        ({}, {"grid_size": (14, 14), "num_patches": 196, "num_prefix_tokens": 1}),
        ({"dim": 1152, "heads": 16}, {"head_dim": 72, "mlp_dim": 4608}),
        ({"dim": 100, "heads": 3, "head_dim": 40}, {"head_dim": 40, "mlp_dim": 400}),
        ({"mlp_dim": 10}, {"mlp_dim": 10}),
        ({"pool": "mean"}, {"norm_after_pool": True}),
        ({"pool": "mean", "norm_after_pool": False}, {"norm_after_pool": False}),
        ({"pool": "map"}, {"norm_after_pool": False}),
        ({"norm_after_pool": True}, {"norm_after_pool": True}),
        ({"image_size": [96, 128], "patch_size": [8, 16]}, {"image_size": (96, 128), "patch_size": (8, 16)}),
        ({"image_size": (96, 128), "patch_size": (8, 16)}, {"grid_size": (12, 8), "num_patches": 96}),
        ({"image_size": 100, "dynamic_image_size": True}, {"grid_size": (6, 6)}),
        ({"class_token": False, "pool": "mean", "register_tokens": 4}, {"num_prefix_tokens": 4}),
        ({"distillation_token": True}, {"num_prefix_tokens": 2}),
        ({"image_size": 16, "depth": 0, "num_classes": 0}, {"grid_size": (1, 1), "num_patches": 1}),
        ({"drop_path": 0, "layer_scale": 1, "norm_eps": 1}, {"drop_path": 0, "layer_scale": 1}),
    ],
    ids=str,
)
def test_derived_value_is_another(fields, derived):
    """A head dim, hidden width, grid or place of the final norm that differs from what was asked for."""
    config = ViTConfig(**fields)
    assert {name: getattr(config, name) for name in derived} == derived


def test_config_can_change_after_it_was_checked():
    """A model whose config says something else than it was built from; a config that cannot be a dict's key."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEFAULTS.dim = 64
    with pytest.raises(dataclasses.FrozenInstanceError):
        del DEFAULTS.dim
    assert hash(ViTConfig(image_size=[224, 224])) == hash(DEFAULTS) and ViTConfig(patch_size=[16, 16]) == DEFAULTS
    with pytest.raises(TypeError, match="positional"):
        ViTConfig(224)
    with pytest.raises(TypeError, match="img_size"):
        ViTConfig(img_size=224)


def test_replaced_config_is_unchecked_or_changes_the_original():
    changed = DEFAULTS.replace(image_size=96, drop_path=0.1)
    assert (changed.image_size, changed.drop_path, changed.dim) == ((96, 96), 0.1, 768)
    assert ViTConfig() == DEFAULTS
    with pytest.raises(ValueError, match="ViTConfig.drop_path must be a number in"):
        DEFAULTS.replace(drop_path=2)
    with pytest.raises(TypeError, match="imagesize"):
        DEFAULTS.replace(imagesize=96)


def test_replaced_width_keeps_the_derived_values():
    """Derived values stay as they were built: who changes `dim` has to say what happens to them."""
    assert DEFAULTS.replace(dim=384).mlp_dim == 3072
    assert DEFAULTS.replace(dim=384, heads=6, mlp_dim=None, head_dim=None) == ViTConfig(dim=384, heads=6)


@pytest.mark.parametrize("name", sorted(VARIANTS))
def test_dict_is_another_config(name):
    """A field that is lost or changes its type on the way through a file's JSON."""
    config = ViTConfig(**VARIANTS[name])
    assert ViTConfig(**config.to_dict()) == config
    assert ViTConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert list(config.to_dict()) == [field.name for field in dataclasses.fields(ViTConfig)]
