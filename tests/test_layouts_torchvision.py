"""torchvision's models under torchvision's names, of today and of before."""

import pytest
import torch
from test_load import assert_same, filled
from torchvision.models.vision_transformer import ConvStemConfig, VisionTransformer, interpolate_embeddings

import vitfast


def build(image_size=32, **changes):
    how = dict(patch_size=8, num_layers=2, num_heads=3, hidden_dim=96, mlp_dim=160, num_classes=7)
    return filled(VisionTransformer(image_size=image_size, **how | changes)).double()


def old_names(state):
    return {name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): v for name, v in state.items()}


@pytest.mark.parametrize("names", [dict, old_names])
@pytest.mark.parametrize("image_size", [32, 48])
def test_a_model_of_torchvision_is_taken_for_another(names, image_size):
    theirs = build()
    images = torch.randn(2, 3, image_size, image_size)
    for source in (theirs, names(theirs.state_dict())):
        how = {} if source is theirs else {"heads": 3}
        ours = vitfast.load(source, image_size=image_size, dtype=torch.float64, **how)
        other = build(image_size)
        other.load_state_dict(interpolate_embeddings(image_size, 8, theirs.state_dict()))
        assert_same(ours, other, images)


def test_layer_before_the_classifier_is_dropped_without_a_word():
    theirs = build(representation_size=64)
    with pytest.raises(NotImplementedError, match=r"heads\.pre_logits.*num_classes=0"):
        vitfast.load(theirs)
    ours = vitfast.load(theirs, num_classes=0, dtype=torch.float64)
    theirs.heads = torch.nn.Identity()
    assert_same(ours, theirs, torch.randn(2, 3, 32, 32))


def test_stem_of_convolutions_is_taken_for_a_patch_projection():
    stem = [ConvStemConfig(out_channels=16, kernel_size=3, stride=2)] * 3
    theirs = build(conv_stem_configs=stem)
    with pytest.raises(NotImplementedError, match="torchvision's ViT with a stem of convolutions"):
        vitfast.load(theirs.state_dict())


def test_rates_of_a_model_in_training_are_lost():
    theirs = build(dropout=0.1, attention_dropout=0.2)
    config = vitfast.load(theirs).config
    assert (config.emb_dropout, config.proj_dropout, config.mlp_dropout, config.attn_dropout) == (0.1, 0.1, 0.1, 0.2)
