"""Each library's resampling of positions, and timm's adaptation of input channels, against the library itself."""

import pytest
import scipy.ndimage
import timm
import torch
import torchvision
import transformers
from timm.models._manipulate import adapt_input_conv
from torch.nn.functional import interpolate

from vitfast.weights.resample import MODES, adapt_input_channels, resample_pos_embed

D = 24
SIZES = [((7, 7), (4, 4)), ((5, 5), (9, 9)), ((6, 6), (4, 9)), ((4, 9), (6, 6)), ((3, 8), (5, 4))]
SQUARES = SIZES[:2]
FROM_SQUARES = SIZES[:3]


def positions(grid, prefix):
    return torch.randn(1, prefix + grid[0] * grid[1], D)


def by_timm(x, old, new, prefix):
    return timm.layers.resample_abs_pos_embed(x, list(new), old_size=list(old), num_prefix_tokens=prefix)


def by_hugging_face(kind, config):
    def resample(x, old, new, prefix):
        small = dict(hidden_size=D, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=4 * old[0])
        embeddings = kind(config(**small)).embeddings
        embeddings.position_embeddings.data.copy_(x)
        tokens = torch.zeros(1, 1 + new[0] * new[1], D)
        return embeddings.interpolate_pos_encoding(tokens, 4 * new[0], 4 * new[1]).detach()

    return resample


def by_torchvision(x, old, new, prefix):
    state = {"encoder.pos_embedding": x}
    return torchvision.models.vision_transformer.interpolate_embeddings(4 * new[0], 4, state)["encoder.pos_embedding"]


def by_scipy(x, old, new, prefix):
    """As google-research's checkpoint.py and big_vision's vit.py do."""
    grid = x[0, prefix:].reshape(*old, D).numpy()
    zoomed = scipy.ndimage.zoom(grid, (new[0] / old[0], new[1] / old[1], 1), order=1)
    return torch.cat([x[:, :prefix], torch.from_numpy(zoomed).reshape(1, -1, D)], dim=1)


def by_dinov2(x, old, new, prefix):
    """Its own code scales by (size + 0.1) / old and lets torch round the size down."""
    grid = x[:, prefix:].reshape(1, *old, D).permute(0, 3, 1, 2)
    scale = ((new[0] + 0.1) / old[0], (new[1] + 0.1) / old[1])
    grid = interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    assert grid.shape[2:] == new
    return torch.cat([x[:, :prefix], grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


VIT = transformers.ViTModel, transformers.ViTConfig
DINOV2 = transformers.Dinov2Model, transformers.Dinov2Config
REGISTERS = transformers.Dinov2WithRegistersModel, transformers.Dinov2WithRegistersConfig
LIBRARIES = {
    "timm": ("timm", by_timm, SIZES, (0, 1, 5)),
    "hf vit": ("hf", by_hugging_face(*VIT), FROM_SQUARES, (1,)),
    "hf dinov2": ("hf", by_hugging_face(*DINOV2), FROM_SQUARES, (1,)),
    "hf registers": ("timm", by_hugging_face(*REGISTERS), FROM_SQUARES, (1,)),
    "torchvision": ("torchvision", by_torchvision, SQUARES, (1,)),
    "google": ("google", by_scipy, SIZES, (0, 1)),
    "dinov2": ("dinov2", by_dinov2, SIZES, (0, 1)),
}


@pytest.mark.parametrize("library", LIBRARIES)
def test_positions_are_not_those_of_the_library(library):
    mode, resample, sizes, prefixes = LIBRARIES[library]
    for old, new in sizes:
        for prefix in prefixes:
            x = positions(old, prefix)
            found, expected = resample_pos_embed(x, new, old, prefix, mode=mode), resample(x, old, new, prefix)
            assert found.shape == expected.shape and (found - expected).abs().max() < 1e-5, (old, new, prefix)
            assert torch.equal(found[:, :prefix], x[:, :prefix])


def test_modes_are_one_and_the_same():
    """A mode that is another under its name would pass for it."""
    x = positions((7, 7), 1)
    found = {mode: resample_pos_embed(x, (5, 5), (7, 7), 1, mode=mode) for mode in MODES}
    for one in MODES:
        for other in MODES:
            assert one == other or (found[one] - found[other]).abs().max() > 1e-2, (one, other)
    assert all(resample_pos_embed(x, (7, 7), (7, 7), 1, mode=mode) is x for mode in MODES)


def test_unknown_mode_or_rectangle_is_taken():
    x = positions((4, 4), 1)
    with pytest.raises(ValueError, match="mode must be one of timm, hf.*got 'nearest'"):
        resample_pos_embed(x, (2, 2), (4, 4), 1, mode="nearest")
    with pytest.raises(ValueError, match="square grids.*4x4 to 2x8"):
        resample_pos_embed(x, (2, 8), (4, 4), 1, mode="torchvision")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 7])
def test_channels_are_not_adapted_as_timm_does(channels):
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(8, 3, 4, 4).to(dtype)
        found, expected = adapt_input_channels(weight, channels), adapt_input_conv(channels, weight)
        assert found.dtype == dtype and torch.equal(found, expected)
