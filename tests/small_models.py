"""Small models for the tests of `vitfast.prepare`."""

import torch

import vitfast

TINY = dict(img_size=32, depth=2, num_classes=10)


def tiny(name="vit_tiny_patch16_224", **changes):
    torch.manual_seed(0)
    return vitfast.create_model(name, **{**TINY, **changes}).eval()


def images_for(model, batch=2, size=None):
    return torch.randn(batch, model.config.channels, *(size or model.config.image_size))
