"""vitfast.ViT next to vit-pytorch's ViT: signature, initialisation, numbers, weights, optimizer state, wrappers."""

import copy
import inspect
import pickle

import pytest
import torch
import vit_pytorch
from textbook import Textbook
from torch import nn
from vit_pytorch.dino import Dino
from vit_pytorch.mae import MAE

import vitfast
from vitfast.check.acceptance import accept_model

SMALL = dict(image_size=32, patch_size=8, num_classes=40, dim=64, depth=2, heads=4, mlp_dim=128, dim_head=16)
CASES = {
    "cls": {},
    "mean": dict(pool="mean"),
    "inner_wider_than_dim": dict(dim_head=24),
    "inner_narrower_than_dim": dict(heads=1, dim_head=32),
    "no_projection": dict(heads=1, dim_head=64),
    "tokens": dict(num_classes=0),
    "tokens_mean": dict(num_classes=0, pool="mean"),
    "rectangles": dict(image_size=(16, 48), patch_size=(8, 4)),
    "grey": dict(channels=1),
}
every_case = pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
few_cases = pytest.mark.parametrize("changes", [CASES["cls"], CASES["mean"], CASES["no_projection"]])


def pair(dtype=torch.float32, **changes):
    """Their model and ours with the same weights: LayerNorm gains up to 10 and one massive channel, as in training."""
    theirs = vit_pytorch.ViT(**{**SMALL, **changes})
    with torch.no_grad():
        for module in theirs.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.copy_(torch.randn_like(module.weight).mul(0.7).exp().clamp(max=10))
                module.bias.normal_(std=0.3)
        theirs.pos_embedding[:, 3] += 30
    theirs, ours = theirs.to(dtype), vitfast.ViT(**{**SMALL, **changes}).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def images(batch=2, image_size=(32, 32), channels=3, dtype=torch.float32, **_):
    return torch.randn(batch, channels, *image_size, dtype=dtype)


def close(out, expected, tol=1e-5):
    """Within `tol` of the largest expected value."""
    torch.testing.assert_close(out, expected, rtol=0, atol=tol * max(expected.abs().max().item(), 1e-6))


def test_constructor_has_another_keyword_or_default():
    theirs, ours = (list(inspect.signature(m.ViT).parameters.values()) for m in (vit_pytorch, vitfast))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in theirs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours)


@every_case
def test_same_seed_draws_other_initial_weights(changes):
    kw = {**SMALL, **changes}
    torch.manual_seed(11)
    theirs = vit_pytorch.ViT(**kw).state_dict()
    torch.manual_seed(11)
    ours = vitfast.ViT(**kw).state_dict(layout="vit_pytorch")
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_argument_that_vit_pytorch_refuses_is_accepted():
    with pytest.raises(ValueError, match="pool.*'cls' or 'mean'.*'max'"):
        vitfast.ViT(**SMALL, pool="max")
    with pytest.raises(ValueError, match="image_size"):
        vitfast.ViT(**{**SMALL, "image_size": 30})


def run(model, x, cotangent):
    """Output and all gradients, in the order of the parameters."""
    y = model(x)
    y.backward(cotangent.to(y.dtype))
    return y, [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_case
def test_forward_or_gradient_is_less_exact_than_vit_pytorch(changes, dtype, train):
    low, ours = pair(dtype, **changes)
    x = images(8, dtype=dtype, **changes)
    ref = copy.deepcopy(low).double()
    cotangent = torch.randn_like(low(x))
    for model in (low, ours, ref):
        model.train(train)
    y_ref, grads_ref = run(ref, x.double(), cotangent)
    with Textbook():
        y_low, grads_low = run(low, x, cotangent)
        y, grads = run(ours, x, cotangent)
    accept_model(y, y_ref, y_low, what="output")

    relative = lambda g, r: ((g.double() - r).square().mean() / r.square().mean()).sqrt()  # noqa: E731
    names = [name for name, parameter in ours.named_parameters() if parameter.numel()]
    refs, lows, found = ([g for g in gs if g is not None and g.numel()] for gs in (grads_ref, grads_low, grads))
    of_low = torch.stack([relative(g, r) for g, r in zip(lows, refs, strict=True)])
    of_ours = torch.stack([relative(g, r) for g, r in zip(found, refs, strict=True)])
    # one gain of a massive channel can dominate a tensor, so a tensor is held to the worst of theirs; eight roundings
    # of fp32 more, because where only the class token is computed a gain's gradient sums eight numbers, by luck or not
    allowed = 3 * of_low.max() + 8 * torch.finfo(torch.float32).eps
    bad = [n for n, error in zip(names, of_ours, strict=True) if not error <= allowed]
    assert not bad, f"gradients of {bad}: {of_ours.max()} against {of_low.max()}"
    assert of_ours.square().mean().sqrt() <= 2 * of_low.square().mean().sqrt()


@every_case
def test_architecture_differs_in_fp64(changes):
    """Rounding hides a wrong eps, scale or GELU at lower precision."""
    theirs, ours = pair(torch.float64, **changes)
    x = images(dtype=torch.float64, **changes)
    cotangent = torch.randn_like(theirs(x))
    y_theirs, grads_theirs = run(theirs, x, cotangent)
    y, grads = run(ours, x, cotangent)
    close(y, y_theirs, 1e-12)
    for (name, _), g, expected in zip(ours.named_parameters(), grads, grads_theirs, strict=True):
        # an empty class token has a gradient too: without one, DDP waits for it forever
        assert g is not None and g.shape == expected.shape, name
        if g.numel():
            close(g, expected, 1e-11)


def test_any_layer_norm_has_eps_1e_6():
    """Rows of variance near 1e-5 tell 1e-5 from 1e-6 in fp32, for each LayerNorm alone."""
    theirs, ours = pair()
    with torch.no_grad():
        for model in (theirs, ours):
            model.pos_embedding.mul_(1e-4)
            model.cls_token.mul_(3e-3)
            for linear in (m for m in model.modules() if isinstance(m, nn.Linear)):
                linear.weight.mul_(0.02)
                if linear.bias is not None:
                    linear.bias.mul_(0.02)
            model.to_patch_embedding[3].weight.mul_(3e-3)
            model.to_patch_embedding[3].bias.mul_(3e-3)
    x = images() * 3e-3
    expected = theirs(x)
    close(ours(x), expected, 1e-5)
    norms = [module for module in ours.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 3 + 2 * SMALL["depth"]
    for norm in norms:
        norm.eps = 1e-6
        assert (ours(x) - expected).abs().max() > 1e-4 * expected.abs().max(), "this test does not see eps"
        norm.eps = 1e-5


@pytest.mark.parametrize("size", [(16, 16), (32, 8), (8, 32), (8, 8)], ids=str)
@few_cases
def test_smaller_images_get_other_than_the_first_positions(changes, size):
    theirs, ours = pair(**changes)
    x = images(image_size=size)
    close(ours(x), theirs(x))


def test_larger_or_uneven_images_are_accepted():
    ours = vitfast.ViT(**SMALL)
    with pytest.raises(ValueError, match="25 tokens|26 tokens"):
        ours(images(image_size=(40, 40)))
    with pytest.raises(ValueError, match="multiples of the patch 8x8, got 32x30"):
        ours(images(image_size=(32, 30)))


@few_cases
@pytest.mark.parametrize("rates", [dict(dropout=0.3), dict(emb_dropout=0.3)], ids=str)
def test_dropout_is_dead_in_training_or_alive_in_eval(changes, rates):
    theirs, ours = pair(**changes, **rates)
    x = images(4)
    close(ours.eval()(x), theirs.eval()(x))
    ours.train()
    first = ours(x)
    assert not torch.equal(first, ours(x))
    first.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in ours.parameters() if parameter.numel())


def dropouts(model):
    """The dropouts of their or our model by place."""
    if isinstance(model, vitfast.ViT):
        attentions, mlps = [block.attn for block in model.blocks], [block.mlp for block in model.blocks]
        return dict(
            embedding=[model.pos_drop], attention=[a.attn_drop for a in attentions],
            projection=[a.proj_drop for a in attentions], hidden=[m.drop1 for m in mlps], mlp=[m.drop2 for m in mlps],
        )  # fmt: skip
    attentions, mlps = zip(*model.transformer.layers, strict=True)
    return dict(
        embedding=[model.dropout], attention=[a.dropout for a in attentions],
        projection=[m for a in attentions for m in a.to_out.children() if isinstance(m, nn.Dropout)],
        hidden=[m.net[3] for m in mlps], mlp=[m.net[5] for m in mlps],
    )  # fmt: skip


@few_cases
@pytest.mark.parametrize("place", ["embedding", "attention", "projection", "hidden", "mlp"])
def test_dropout_is_missing_or_extra_in_one_place(changes, place):
    """With all but one kind switched off, training differs from eval exactly where it does in vit-pytorch."""
    x, varies = images(4), []
    for model in pair(**changes, dropout=0.5, emb_dropout=0.5):
        for module in sum((modules for other, modules in dropouts(model).items() if other != place), []):
            module.p = 0.0
        varies.append(not torch.equal(model.train()(x), model.eval()(x)))
    assert varies[1] == varies[0]


@every_case
def test_weights_do_not_survive_the_way_in_and_out(changes):
    theirs = vit_pytorch.ViT(**{**SMALL, **changes}).state_dict()
    ours = vitfast.ViT(**{**SMALL, **changes})
    ours.load_state_dict(theirs)
    back = ours.state_dict(layout="vit_pytorch")
    assert list(back) == list(theirs)
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    vit_pytorch.ViT(**{**SMALL, **changes}).load_state_dict(back)
    assert not any(name.startswith(("transformer", "to_patch")) for name in ours.state_dict())


@few_cases
def test_optimizer_state_lands_on_other_parameters(changes):
    theirs, ours = pair(torch.float64, **changes, dropout=0.0)
    x, labels = images(8, dtype=torch.float64), torch.arange(8)

    def step(model, optimizer):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), labels).backward()
        optimizer.step()

    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    for _ in range(3):
        step(theirs, optimizer)
    ours.load_state_dict(theirs.state_dict())
    resumed = torch.optim.AdamW(ours.parameters(), lr=1e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert parameter.shape == other.shape
    step(theirs, optimizer)
    step(ours, resumed)
    weights = ours.state_dict(layout="vit_pytorch")
    for name, expected in theirs.state_dict().items():
        torch.testing.assert_close(weights[name], expected, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@every_case
def test_copy_or_pickle_is_another_model(changes):
    _, ours = pair(**changes)
    x = images(**changes)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is vitfast.ViT and twin.config == ours.config
        assert torch.equal(twin(x), ours(x))
        assert not any(a is b for a, b in zip(twin.parameters(), ours.parameters(), strict=True))


def mae_of(encoder, seed):
    torch.manual_seed(seed)
    return MAE(encoder=encoder, decoder_dim=32, decoder_heads=2, decoder_dim_head=16)


def test_mae_on_our_model_trains_other_weights():
    """MAE reads pos_embedding, to_patch_embedding, transformer and pool, and trains the encoder through them."""
    theirs, ours = pair(pool="mean")
    before = copy.deepcopy(ours.state_dict())
    masked = {model: mae_of(model, seed=3) for model in (theirs, ours)}
    x, losses = images(4), []
    for mae in masked.values():
        torch.manual_seed(4)
        losses.append(mae(x))
        losses[-1].backward()
        torch.optim.SGD(mae.parameters(), lr=0.1).step()
    close(losses[1], losses[0])
    weights = ours.state_dict(layout="vit_pytorch")
    for name, expected in theirs.state_dict().items():
        if expected.numel():
            close(weights[name], expected, 1e-4)
    stayed = {name for name, value in ours.state_dict().items() if torch.equal(value, before[name])}
    assert stayed == {"cls_token", "head.weight", "head.bias"}


@pytest.mark.parametrize("layer", ["to_latent", -2])
def test_dino_on_our_model_embeds_something_else(layer):
    """Dino hooks a layer by name or position, deep-copies the model for its teacher, and trains it."""
    theirs, ours = pair()
    kw = dict(image_size=32, hidden_layer=layer, projection_hidden_size=32, projection_layers=2, num_classes_K=16)
    x, learners = images(2), []
    for model in (theirs, ours):
        torch.manual_seed(5)
        learners.append(Dino(model, **kw))
    expected, embedded = (dino(x, return_embedding=True, return_projection=False) for dino in learners)
    close(embedded, expected)
    learners[1](x).backward()
    learners[1].update_moving_average()
    assert all(parameter.grad.isfinite().all() for parameter in ours.blocks.parameters())


@few_cases
def test_attribute_that_wrappers_read_is_missing_or_computes_something_else(changes):
    theirs, ours = pair(**changes)
    x = images()
    assert ours.pool == theirs.pool and ours.patch_size == theirs.patch_size
    assert torch.equal(ours.pos_embedding, theirs.pos_embedding) and torch.equal(ours.cls_token, theirs.cls_token)
    assert ours.pos_embedding is ours.pos_embed and ours.mlp_head is ours.head
    close(ours.to_patch_embedding(x), theirs.to_patch_embedding(x))
    patches = ours.to_patch_embedding[0](x)
    assert torch.equal(patches, theirs.to_patch_embedding[0](x))
    close(ours.to_patch_embedding[1:](patches), theirs.to_patch_embedding(x))
    tokens = torch.randn(2, 5, 64)
    close(ours.transformer(tokens), theirs.transformer(tokens))
    inside = {id(p) for p in (*ours.transformer.parameters(), *ours.to_patch_embedding.parameters())}
    wrapper = nn.ModuleList([ours.to_patch_embedding, ours.transformer]).eval()
    assert not ours.norm.training and wrapper.train() and ours.norm.training
    outside = {"cls_token", "pos_embed", "head.weight", "head.bias"}
    assert inside == {id(p) for name, p in ours.named_parameters() if name not in outside}
    assert vitfast.ViT(**{**SMALL, "num_classes": 0}).mlp_head is None


def test_assigned_head_or_positions_have_no_effect():
    theirs, ours = pair()
    x = images()
    for model in (theirs, ours):
        model.mlp_head = nn.Identity()
        with torch.no_grad():
            model.pos_embedding = nn.Parameter(model.pos_embedding * 0.5)
    assert ours(x).shape == (2, 64)
    close(ours(x), theirs(x))
    latent = nn.Linear(64, 64)
    theirs.to_latent = ours.to_latent = latent
    close(ours(x), theirs(x))


def test_assignment_to_a_view_is_lost_silently():
    ours = vitfast.ViT(**SMALL)
    with pytest.raises(AttributeError, match="patch_embed.*blocks"):
        ours.transformer = nn.Identity()
    with pytest.raises(AttributeError, match="patch_embed.*blocks"):
        ours.to_patch_embedding = nn.Identity()
    with pytest.raises(NotImplementedError, match=r"model\.blocks\[i\]"):
        ours.transformer.layers  # noqa: B018


def test_assignment_into_a_view_is_lost_silently():
    """`v.transformer.norm = ...` changes vit-pytorch's model; on a view that is made anew it would do nothing."""
    ours, x = vitfast.ViT(**SMALL), images()
    before, new = ours(x), nn.Identity()
    for assign in (
        lambda: setattr(ours.transformer, "norm", new),
        lambda: ours.to_patch_embedding.__setitem__(3, new),
        lambda: ours.to_patch_embedding.__delitem__(3),
        lambda: ours.to_patch_embedding.append(nn.Tanh()),
    ):
        try:
            assign()
        except (AttributeError, NotImplementedError, TypeError) as error:
            assert "norm" in str(error) or "patch_embed" in str(error)  # noqa: PT017
        else:
            assert not torch.equal(ours(x), before)


def test_timm_flavoured_model_pretends_to_have_vit_pytorch_attributes():
    model = vitfast.ViT.from_config(vitfast.ViTConfig(image_size=32, dim=64, depth=1, heads=2))
    instead = dict(to_patch_embedding="patch_embed", transformer="blocks", pos_embedding="pos_embed", mlp_head="head")
    for name, ours in instead.items():
        assert not hasattr(model, name)
        with pytest.raises(AttributeError, match=f"{name}.*use '{ours}"):
            getattr(model, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        model.nothing  # noqa: B018
    assert hasattr(vitfast.ViT(**SMALL), "transformer")


def test_assigned_pooling_dropout_or_head_has_no_effect():
    """Fine-tuning code that changes vit-pytorch's attributes on the model."""
    keywords = dict(image_size=32, patch_size=8, num_classes=5, dim=64, depth=2, heads=4, mlp_dim=128)
    x = torch.randn(2, 3, 32, 32)
    theirs, ours = vit_pytorch.ViT(**keywords).eval(), vitfast.ViT(**keywords).eval()
    ours.load_state_dict(theirs.state_dict())
    head = torch.nn.Linear(64, 3)
    for value in ("mean", "cls"):
        theirs.pool = ours.pool = value
        close(ours(x), theirs(x), 1e-5)
    for model in (theirs, ours):
        model.mlp_head = None
    assert ours.mlp_head is None and ours(x).shape == (2, 17, 64)
    for model in (theirs, ours):
        model.mlp_head = head
    close(ours(x), theirs(x), 1e-5)
    assert ours.mlp_head is head and ours.config.num_classes == 3
    ours.dropout = torch.nn.Dropout(0.9)
    assert ours.dropout is ours.pos_drop
    assert not torch.equal(ours.train()(x), ours(x))
    with pytest.raises(ValueError, match="pool must be 'cls' or 'mean', got 'max'"):
        ours.pool = "max"
    with pytest.raises(AttributeError, match="this view would"):
        ours.transformer.forward = print
