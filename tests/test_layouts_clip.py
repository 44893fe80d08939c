"""Vision towers of CLIP and SigLIP: read as another model, in part, or without being asked what no name tells."""

import pytest
import timm
import torch
import transformers

import vitfast
from vitfast.loading.recognise import recognise
from vitfast.weights.layouts.layout import Facts, NeedsArgument, sources_of
from vitfast.weights.names import own_weights

transformers.utils.logging.disable_progress_bar()
VISION = dict(
    hidden_size=96, num_hidden_layers=2, num_attention_heads=3, intermediate_size=160, image_size=32, patch_size=8,
)  # fmt: skip
TEXT = dict(
    hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=40,
    max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
# what a config of Hugging Face has that is not a default
OTHER = {"hidden_act": "gelu", "layer_norm_eps": 1e-3, "num_attention_heads": 6}


@torch.no_grad()
def filled(model):
    """Weights as trained ones are, so that none has no effect: gains around one, biases, sharp attention."""
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and name.endswith("weight"):
            weight.normal_(std=0.3).exp_()
        elif weight.dim() < 2:
            weight.normal_(std=0.3)
        else:
            weight.normal_(std=1.5 * weight[0].numel() ** -0.5)
    return model.eval()


def assert_close(found, expected, bound=1e-10):
    """In fp64, where a formula that differs is plain."""
    assert found.shape == expected.shape
    assert (found - expected).norm() <= bound * expected.norm()


# Hugging Face


def clip(of, vision=VISION, **own):
    if of is transformers.CLIPVisionModel or of is transformers.CLIPVisionModelWithProjection:
        return of(transformers.CLIPVisionConfig(**vision, projection_dim=24))
    return of(transformers.CLIPConfig(vision_config=vision, text_config=TEXT, projection_dim=24, **own))


def siglip(of, vision=VISION, **own):
    if of is transformers.SiglipVisionModel:
        return of(transformers.SiglipVisionConfig(**vision))
    return of(transformers.SiglipConfig(vision_config=vision, text_config=TEXT, **own))


def image_features(model, images, **how):
    return model.get_image_features(pixel_values=images, **how).pooler_output


HUGGING_FACE = {
    "CLIP": (lambda: clip(transformers.CLIPVisionModel), lambda m, x, **how: m(x, **how).pooler_output),
    "CLIP erf": (
        lambda: clip(transformers.CLIPVisionModel, VISION | OTHER),
        lambda m, x, **how: m(x, **how).pooler_output,
    ),
    "CLIP projected": (
        lambda: clip(transformers.CLIPVisionModelWithProjection),
        lambda m, x, **how: m(x, **how).image_embeds,
    ),
    "CLIP with text": (lambda: clip(transformers.CLIPModel), image_features),
    "CLIP with text erf": (lambda: clip(transformers.CLIPModel, VISION | OTHER), image_features),
    "CLIP classifier": (
        lambda: clip(transformers.CLIPForImageClassification, num_labels=5),
        lambda m, x, **how: m(pixel_values=x, **how).logits,
    ),
    "SigLIP": (lambda: siglip(transformers.SiglipVisionModel), lambda m, x, **how: m(x, **how).pooler_output),
    "SigLIP erf": (
        lambda: siglip(transformers.SiglipVisionModel, VISION | OTHER),
        lambda m, x, **how: m(x, **how).pooler_output,
    ),
    "SigLIP with text": (lambda: siglip(transformers.SiglipModel), image_features),
    "SigLIP without head": (
        lambda: siglip(transformers.SiglipVisionModel, VISION | {"vision_use_head": False}),
        lambda m, x, **how: m(x, **how).last_hidden_state,
    ),
    "SigLIP classifier": (
        lambda: siglip(transformers.SiglipForImageClassification, num_labels=5),
        lambda m, x, **how: m(pixel_values=x, **how).logits,
    ),
}


def tower_of(model):
    return getattr(model, "vision_model", model)


@torch.no_grad()
@pytest.mark.parametrize("where", ["memory", "folder"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_a_tower_of_hugging_face_is_read_as_another(name, where, tmp_path):
    """Its tokens, and what it makes of them: pooled, projected or classified."""
    build, output = HUGGING_FACE[name]
    theirs = filled(build()).double()
    if where == "folder":
        theirs.save_pretrained(tmp_path)
    ours = vitfast.load(theirs if where == "memory" else tmp_path, dtype=torch.float64)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    tower = tower_of(theirs)
    tokens = tower(images).last_hidden_state
    if name.startswith("CLIP") and name != "CLIP classifier":
        # its own tokens are those before the norm, which only the class token goes through
        tokens = tower.post_layernorm(tokens)
    assert_close(ours.forward_features(images), tokens)
    assert_close(ours(images), output(theirs, images))
    assert ("the text tower" in str(ours.load_report)) == ("with text" in name)


@torch.no_grad()
@pytest.mark.parametrize("size", [(48, 48), (16, 40)])
@pytest.mark.parametrize("name", ["CLIP projected", "SigLIP with text"])
def test_positions_are_resampled_otherwise_than_by_hugging_face(name, size, tmp_path):
    """Bicubic without antialiasing, which counts where the grid shrinks."""
    build, output = HUGGING_FACE[name]
    theirs = filled(build())
    theirs.save_pretrained(tmp_path)
    ours = vitfast.load(tmp_path, image_size=size)
    images = torch.randn(2, 3, *size)
    assert_close(ours(images), output(theirs, images, interpolate_pos_encoding=True), 1e-5)
    assert "resampled as 'hf'" in str(ours.load_report)


def test_activation_of_clip_is_guessed(tmp_path):
    """Without its config nothing tells; SigLIP has one everywhere."""
    theirs = filled(clip(transformers.CLIPVisionModelWithProjection))
    with pytest.raises(NeedsArgument, match="activation must be given, activation='quick_gelu' or activation='gelu'"):
        vitfast.load(theirs.state_dict(), heads=3)
    ours = vitfast.load(theirs.state_dict(), heads=3, activation="quick_gelu")
    assert ours.config.activation == "quick_gelu" and "activation" not in ours.load_report.assumed
    ours = vitfast.load(filled(siglip(transformers.SiglipVisionModel)).state_dict(), heads=3)
    assert ours.config.activation == "gelu_tanh" and "as all of SigLIP" in ours.load_report.assumed["activation"]


def described(state, facts=None, given=None, as_=None):
    """The layout, its config and where each weight comes from, of weights on the meta device."""
    facts = facts or Facts()
    found = recognise(state, facts, as_)
    known = found.layout.describe(found.view, facts, given or {})
    config = vitfast.ViTConfig(**known.fields | (given or {}))
    with torch.device("meta"):
        own = own_weights(vitfast.ViT.from_config(config))
    return found.layout.name, config, sources_of(found.layout, found.view, config, own), known


def on_meta(of, **sizes):
    with torch.device("meta"):
        return of(**sizes).state_dict()


def test_a_field_that_googles_config_leaves_out_is_lost():
    """Their config.json of SigLIP says no more than the kind; transformers fills in its defaults."""
    base = VISION | {"hidden_size": 768, "num_attention_heads": 12}
    state = on_meta(lambda **v: siglip(transformers.SiglipVisionModel, v), **base)
    hf = {"model_type": "siglip", "vision_config": {"model_type": "siglip_vision_model"}}
    _, config, _, known = described(state, Facts(hf=hf))
    assert (config.heads, config.activation, config.norm_eps) == (12, "gelu_tanh", 1e-6)
    assert set(known.assumed) == {"preprocessing"}
    state = on_meta(lambda **v: clip(transformers.CLIPVisionModel, v), **base)
    vision = {"hidden_act": "gelu", "attention_dropout": 0.1}
    _, config, _, known = described(state, Facts(hf={"vision_config": vision}))
    assert (config.heads, config.activation, config.norm_eps, config.attn_dropout) == (12, "gelu", 1e-5, 0.1)


@pytest.mark.parametrize(("dim", "depth", "heads"), [(768, 12, 12), (1152, 27, 16), (1536, 40, 16)])
def test_heads_of_another_family_are_taken(dim, depth, heads):
    """A DINOv2 as wide and deep as SigLIP's giant has 24."""
    sizes = VISION | {"hidden_size": dim, "num_hidden_layers": depth, "num_attention_heads": heads}
    _, config, _, known = described(on_meta(lambda **v: siglip(transformers.SiglipVisionModel, v), **sizes))
    assert config.heads == heads and "siglip" in known.assumed["heads"]


def test_pixels_that_a_patch_cuts_off_are_not_told():
    """Of 384 pixels 27 patches of 14 leave 6."""
    state = on_meta(lambda **v: siglip(transformers.SiglipVisionModel, v), **VISION | {"image_size": 39})
    _, config, _, known = described(state, Facts(hf=VISION | {"image_size": 39}))
    assert config.image_size == (32, 32) and "(39, 39)" in known.assumed["image_size"]


def test_buffers_that_older_transformers_saved_are_refused():
    theirs = filled(clip(transformers.CLIPModel))
    state = theirs.state_dict() | {
        "vision_model.embeddings.position_ids": torch.arange(17)[None],
        "text_model.embeddings.position_ids": torch.arange(8)[None],
    }
    ours = vitfast.load(state, heads=3, activation="quick_gelu")
    assert torch.equal(ours.head.weight, theirs.visual_projection.weight) and not ours.head.bias.any()
    assert ours.load_report.ignored["vision_model.embeddings.position_ids".removeprefix("vision_model.")]


def test_a_pooling_head_without_its_query_is_dropped_without_a_word():
    state = filled(siglip(transformers.SiglipVisionModel)).state_dict()
    del state["head.probe"]
    with pytest.raises(RuntimeError, match=r"missing: head\.probe"):
        vitfast.load(state, heads=3)


def test_a_classifier_of_somebodys_own_is_taken_for_open_clip():
    """A model of timm called trunk, and a Linear beside it: no CLIP is spoken of."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    state = {f"trunk.{key}": weight for key, weight in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"do not fit timm:\n.*unexpected: head\.weight"):
        vitfast.load(state | {"head.weight": torch.ones(5, 192)})


def test_patches_of_any_shape_are_taken_for_a_grid():
    """SigLIP2's NaFlex is a model of its own."""
    config = transformers.Siglip2VisionConfig(**{k: v for k, v in VISION.items() if k != "image_size"}, num_patches=16)
    with pytest.raises(NotImplementedError, match="SigLIP2's NaFlex"):
        vitfast.load(transformers.Siglip2VisionModel(config).state_dict())
