"""Load hooks and modules that translate older weights: torch runs them before anything is compared, and so must we."""

import copy
import re
import warnings
import weakref
from collections import OrderedDict

import pytest
import torch
import vit_pytorch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrizations

import vitfast
from vitfast.weights import state_dict as checks

SMALL = dict(image_size=32, patch_size=16, dim=48, heads=3, mlp_dim=96, depth=2, num_classes=5)


def build(head=None):
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**SMALL)).eval()
    if head is not None:
        model.head = head()
    return model.eval()


def copied(model):
    state = nn.Module.state_dict(model)
    return OrderedDict((key, value if is_lazy(value) else value.detach().clone()) for key, value in state.items())


def images():
    return torch.randn(2, 3, 32, 32)


def old_weight_norm():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(48, 5))


def new_weight_norm():
    return parametrizations.weight_norm(nn.Linear(48, 5))


def test_checkpoint_of_the_older_weight_norm_is_refused():
    saved, model = build(old_weight_norm), build(new_weight_norm)
    state = copied(saved)
    assert {"head.weight_g", "head.weight_v"} < set(state)
    assert not any(model.load_state_dict(state))
    x = images()
    assert torch.equal(model(x), saved(x))
    again = build(old_weight_norm)
    again.load_state_dict(state)
    assert torch.equal(again(x), saved(x))


def normed():
    return nn.Sequential(nn.BatchNorm1d(48), nn.Linear(48, 5))


def test_batch_norm_without_its_counter_is_refused():
    """Weights of releases before the counter, and of all that do not keep the version, as safetensors."""
    saved, model = build(normed), build(normed)
    saved.train()(images())
    saved.eval()
    state = copied(saved)
    del state["head.0.num_batches_tracked"]
    assert not any(model.load_state_dict(state))
    x = images()
    assert torch.equal(model(x), saved(x))
    assert model.head[0].num_batches_tracked == 0


def test_missing_counter_of_todays_batch_norm_is_filled_in(tmp_path):
    """Weights that say that they are new enough to have one, also in a file with a wrapper's prefix."""
    state = nn.DataParallel(build(normed)).state_dict()
    del state["module.head.0.num_batches_tracked"]
    torch.save(state, tmp_path / "m.pt")
    with pytest.raises(RuntimeError, match=r"1 keys do not fit.*nothing was loaded\.\n  missing: head\.0\.num_batches"):
        vitfast.load_checkpoint(build(normed), tmp_path / "m.pt", allow_pickle=True)


def spectral():
    return nn.utils.spectral_norm(nn.Linear(48, 5))


def before_spectral_norm_had_v(state):
    weight, u = state["head.weight_orig"], state["head.weight_u"]
    v = state.pop("head.weight_v")
    return state | {"head.weight": weight / (u @ weight @ v)}


def untracked(state):
    return state | {"head.0.running_mean": torch.zeros(48), "head.0.running_var": torch.ones(48)}


def quantised():
    return nn.Sequential(torch.ao.quantization.PerChannelMinMaxObserver(), nn.Linear(48, 5))


def observed(state):
    """Of the shape of what was observed, which a new observer does not have yet."""
    return {key: torch.ones(48) if "_val" in key else value for key, value in state.items()}


class Scaled(nn.Linear):
    """With a parameter of no dims, for which torch takes one value."""

    def __init__(self):
        super().__init__(48, 5)
        self.scale = nn.Parameter(torch.ones(()))


# head, what older weights have in its place
TRANSLATED = {
    "weight_norm": (new_weight_norm, lambda s: build(old_weight_norm).state_dict()),
    "BatchNorm": (normed, lambda s: {k: v for k, v in s.items() if "num_batches" not in k}),
    "InstanceNorm": (lambda: nn.Sequential(nn.InstanceNorm1d(48, affine=True), nn.Linear(48, 5)), untracked),
    "spectral_norm": (spectral, before_spectral_norm_had_v),
    "lazy": (lambda: nn.LazyLinear(5), lambda s: s | {"head.weight": torch.ones(5, 48), "head.bias": torch.ones(5)}),
    "observers": (quantised, observed),
    "checkpoint_wrapper": (lambda: checkpoint_wrapper(nn.Linear(48, 5)), lambda s: s),
    "scalar": (Scaled, lambda s: s | {"head.scale": torch.full((1,), 3.0)}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("swap", [False, True], ids=["copied", "swapped"])
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("case", TRANSLATED)
def test_module_that_translates_older_weights_loads_otherwise_than_in_torch(case, assign, swap):
    head, older = TRANSLATED[case]
    torch.manual_seed(0)
    ours = build(head)
    state = older(copied(ours))
    # torch's own loading of the same modules
    theirs = nn.ModuleDict({name: copy.deepcopy(module) for name, module in ours.named_children()})
    for name, token in ours.named_parameters(recurse=False):
        theirs.register_parameter(name, nn.Parameter(token.detach().clone()))
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        try:
            expected = theirs.load_state_dict(state, assign=assign)
        except RuntimeError as error:
            said = re.findall(r"running stats|size mismatch", str(error))
            with pytest.raises(RuntimeError, match=f"1 keys do not fit.*nothing was loaded.\n  .*{said[0]}"):
                ours.load_state_dict(state, assign=assign)
        else:
            assert ours.load_state_dict(state, assign=assign) == expected
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def rename(state_dict, prefix, *_):
    for key in [key for key in state_dict if key.startswith(f"{prefix}old_")]:
        state_dict[prefix + key[len(prefix) :].removeprefix("old_")] = state_dict.pop(key)


def rename_with_module(module, state_dict, prefix, *_):
    assert isinstance(module, nn.Module)
    rename(state_dict, prefix)


PUBLIC = (lambda module: module.register_load_state_dict_pre_hook(rename_with_module),)
PRIVATE = (lambda module: module._register_load_state_dict_pre_hook(rename),)


@pytest.mark.parametrize("register", [*PUBLIC, *PRIVATE], ids=["public", "private"])
@pytest.mark.parametrize("part", ["", "blocks.1.attn.qkv", "head"])
def test_pre_hook_runs_after_the_check(part, register):
    saved, model = build(), build()
    register(model.get_submodule(part))
    at = f"{part}." if part else ""
    state = {(at + "old_" + k[len(at) :] if k.startswith(at) else k): v for k, v in copied(saved).items()}
    model.load_state_dict(state)
    x = images()
    assert torch.equal(model(x), saved(x))


def allow_no_head(module, keys):
    keys.missing_keys[:] = [key for key in keys.missing_keys if not key.startswith("head.")]


def add_a_wish(module, keys):
    keys.missing_keys.append("a.wish")
    keys.unexpected_keys.append("a.surprise")


@pytest.mark.parametrize("part", ["", "head"])
def test_post_hook_cannot_change_what_is_missing(part):
    saved, model = build(), build()
    before = copied(model)
    model.get_submodule(part).register_load_state_dict_post_hook(allow_no_head)
    state = {key: value for key, value in copied(saved).items() if not key.startswith("head.")}
    assert not any(model.load_state_dict(state))
    assert torch.equal(model.blocks[1].mlp.fc1.weight, saved.blocks[1].mlp.fc1.weight)
    assert torch.equal(model.head.weight, before["head.weight"])
    model.get_submodule(part).register_load_state_dict_post_hook(add_a_wish)
    with pytest.raises(RuntimeError, match=r"2 keys do not fit(?s:.*)missing: a\.wish\n  unexpected: a\.surprise"):
        model.load_state_dict(copied(saved))
    result = model.load_state_dict(copied(saved), strict=False)
    assert result.missing_keys == ["a.wish"] and result.unexpected_keys == ["a.surprise"]


class Resized(nn.Linear):
    """A classifier that takes the size of the weights."""

    def _load_from_state_dict(self, state_dict, prefix, *args):
        self.out_features = len(state_dict[f"{prefix}weight"])
        self.weight, self.bias = (nn.Parameter(torch.empty_like(state_dict[prefix + k])) for k in ("weight", "bias"))
        self.register_buffer("seen", torch.ones(1), persistent=False)
        super()._load_from_state_dict(state_dict, prefix, *args)


def raises(*_):
    raise KeyError("a hook of the user's")


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", ["keys", "hook before", "hook after"])
def test_refused_weights_leave_something_behind_with_hooks(kind, assign):
    """Weights, buffers, parts, attributes and lazy parameters are as they were, and are the same objects."""
    model = build(lambda: Resized(48, 5))
    model.lazy, model.normed = nn.LazyLinear(3), nn.BatchNorm1d(48)
    state = {key: torch.ones(value.shape) for key, value in copied(model).items() if not key.startswith("lazy")}
    state |= {"lazy.weight": torch.ones(3, 4), "lazy.bias": torch.ones(3)}
    state |= {"head.weight": torch.ones(9, 48), "head.bias": torch.ones(9)}
    probe = copy.deepcopy(model)
    probe.load_state_dict(state, assign=assign)
    assert probe.head.out_features == 9 and probe.lazy.weight.shape == (3, 4) and (probe.norm.bias == 1).all()
    objects = {name: value for name, value in (*model.named_parameters(), *model.named_buffers())}
    weights = {name: value.detach().clone() for name, value in objects.items() if not name.startswith("lazy")}
    if kind == "keys":
        state |= {"norm.weight": torch.ones(7), "stray": torch.ones(1), "norm.bias": 3.0}
        del state["cls_token"]
        said = (
            r"4 keys do not fit ViT; nothing was loaded\.\n  missing: cls_token \[1, 1, 48\]\n  unexpected: stray\n"
            r"(?s:.*)wrong shape: norm\.weight must be \[48\], got \[7\](?s:.*)norm\.bias"
        )
    elif kind == "hook before":
        said = "a hook of the user's"
        model.norm._register_load_state_dict_pre_hook(raises)
    else:
        said = "a hook of the user's"
        model.normed.register_load_state_dict_post_hook(raises)
    with pytest.raises((RuntimeError, KeyError), match=said):
        model.load_state_dict(state, assign=assign)
    now = {name: value for name, value in (*model.named_parameters(), *model.named_buffers())}
    assert list(now) == list(objects) and all(now[name] is value for name, value in objects.items())
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    assert model.head.out_features == 5 and is_lazy(model.lazy.weight)
    model.norm._load_state_dict_pre_hooks.clear()
    model.normed._load_state_dict_post_hooks.clear()
    for key, value in zip(("norm.weight", "norm.bias", "cls_token"), (48, 48, (1, 1, 48)), strict=True):
        state[key] = torch.ones(value)
    state.pop("stray", None)
    model.load_state_dict(state, assign=assign)
    assert model.lazy.weight.shape == (3, 4) and model.head.out_features == 9


@pytest.mark.parametrize("swap", [False, True], ids=["copied", "swapped"])
def test_hook_that_moves_weights_leaves_them_elsewhere(swap):
    """An optimizer, a CUDA graph or a prepared model holds the memory, and the weights are there again."""
    model = build()
    before = {name: (value, value.data_ptr(), value.detach().clone()) for name, value in model.named_parameters()}

    def move(*_):
        for value in model.head.parameters():
            value.data = torch.zeros(7)

    model.head._register_load_state_dict_pre_hook(move)
    swapped = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        with pytest.raises(RuntimeError, match="unexpected: stray"):
            model.load_state_dict(copied(build()) | {"stray": torch.ones(1)})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapped)
    for name, value in model.named_parameters():
        parameter, place, content = before[name]
        assert value is parameter and value.data_ptr() == place and torch.equal(value, content)


class Remembers(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        if state["steps"] < 0:
            raise KeyError("steps")


def remembers():
    return Remembers(48, 5)


def made_in_inference_mode():
    with torch.inference_mode():
        return nn.Linear(48, 5).requires_grad_(False)


def overlapping():
    head = nn.Linear(48, 5)
    head.bias = nn.Parameter(torch.ones(1).expand(5))
    return head


def dropped(module, state, prefix, *_):
    for key in [key for key in state if key.startswith(prefix)]:
        del state[key]


def adds(module, state, prefix, *_):
    state[f"{prefix}made_up"] = torch.ones(1)


def hooked(hook):
    def head():
        head = nn.Linear(48, 5)
        head.register_state_dict_post_hook(hook)
        return head

    return head


QUANTISED = torch.quantize_per_tensor(torch.ones(5), 0.1, 0, torch.qint8)
# head, what else is in the weights, what is said
WITHOUT_HOOKS = {
    "extra state is missing": (remembers, {}, r"missing: head\._extra_state"),
    "extra state is unexpected": (None, {"head._extra_state": 3}, r"unexpected: head\._extra_state"),
    "extra state beside another fault": (remembers, {"stray": torch.ones(1)}, r"2 keys do not fit"),
    "extra state raises": (remembers, {"head._extra_state": {"steps": -1}}, "steps"),
    "meta": (None, {"head.bias": torch.ones(5, device="meta")}, r"head\.bias"),
    "sparse": (None, {"head.bias": torch.ones(5).to_sparse()}, r"head\.bias"),
    "quantised": (None, {"head.bias": QUANTISED}, r"head\.bias"),
    "inference mode": (made_in_inference_mode, {}, r"head\.(weight|bias)"),
    "memory that overlaps": (overlapping, {"head.bias": torch.arange(5.0)}, r"head\.bias"),
    "saving hook adds": (hooked(adds), {"head.made_up": torch.ones(1)}, r"unexpected: head\.made_up"),
    "saving hook drops": (hooked(dropped), {"head.bias": torch.ones(3)}, r"head\.bias must be \[5\], got \[3\]"),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("case", WITHOUT_HOOKS)
def test_refused_weights_leave_something_behind_without_hooks(case, strict):
    head, others, said = WITHOUT_HOOKS[case]
    model = build(head)
    state = {key: torch.full_like(value, 3) for key, value in copied(build()).items()} | others
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    load = lambda: model.load_state_dict(state, strict=strict)  # noqa: E731
    if not strict and said.startswith(("missing", "unexpected", "2 keys")):
        load()
        assert all((value == 3).all() for name, value in model.named_parameters())
        return
    with pytest.raises((RuntimeError, KeyError), match=said):
        load()
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_weights_that_cannot_be_swapped_are_swapped_in_part():
    """torch swaps no parameter of which there is a weak reference."""
    model = build()
    before, held = copied(model), weakref.ref(model.norm.bias)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        with pytest.raises(RuntimeError, match=r"swapping the parameter named .norm\.bias"):
            model.load_state_dict({key: torch.full_like(value, 3) for key, value in before.items()})
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert held() is model.norm.bias
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_inference_weights_are_changed_by_a_refused_load_or_cannot_be_loaded():
    with torch.inference_mode():
        model = build()
        before = copied(model)
        model.head._register_load_state_dict_pre_hook(lambda *_: None)
        state = {key: torch.full_like(value, 3) for key, value in before.items()}
        with pytest.raises(RuntimeError, match="unexpected: stray"):
            model.load_state_dict(state | {"stray": torch.ones(1)})
    with pytest.raises(RuntimeError, match="unexpected: stray"):
        model.load_state_dict(state | {"stray": torch.ones(1)})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with torch.inference_mode():
        model.load_state_dict(state)
    assert all((value == 3).all() for value in model.state_dict().values())


def test_hook_that_leaves_weights_out_of_files_leaves_them_unloaded():
    """Adapter-only saving: torch loads a whole file into such a model, and misses what a partial one lacks."""
    model, saved = build(hooked(dropped)), build()
    model.load_state_dict(copied(saved))
    assert torch.equal(model.head.weight, saved.head.weight)
    with pytest.raises(RuntimeError, match=r"2 keys do not fit(?s:.*)missing: head\.weight \[5, 48\]"):
        model.load_state_dict(copied(model))


@pytest.mark.parametrize("fits", [True, False])
def test_hook_runs_more_than_once(fits):
    model, calls = build(), []
    model.head._register_load_state_dict_pre_hook(lambda *_: calls.append("before"))
    model.register_load_state_dict_post_hook(lambda *_: calls.append("after"))
    state = copied(model)
    if not fits:
        del state["head.bias"]
        with pytest.raises(RuntimeError, match="missing: head.bias"):
            model.load_state_dict(state)
    else:
        model.load_state_dict(state)
    assert calls == ["before", "after"]
    assert not model._load_state_dict_pre_hooks and len(model._load_state_dict_post_hooks) == 1


def test_loading_without_hooks_copies_the_model(monkeypatch):
    monkeypatch.setattr(checks, "_keep", lambda _: pytest.fail("nothing can change the keys here"))
    for model in (build(), vitfast.ViT(**SMALL), build().bfloat16()):
        model.load_state_dict({key: value.float() for key, value in copied(model).items()})


def test_hook_sees_other_names_than_were_given():
    """vit-pytorch's names are translated after the hooks that were written for them."""
    small = SMALL | dict(dim_head=16)
    theirs, model = vit_pytorch.ViT(**small), vitfast.ViT(**small)
    seen = []
    model._register_load_state_dict_pre_hook(lambda state, *_: seen.extend(state))
    model._register_load_state_dict_pre_hook(rename)
    state = {f"old_{key}" if key == "pos_embedding" else key: value for key, value in theirs.state_dict().items()}
    model.load_state_dict(state)
    assert seen == list(state)
    x = images()
    torch.testing.assert_close(model.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="another architecture"):
        other = build()
        other._register_load_state_dict_pre_hook(rename)
        other.load_state_dict(state)
