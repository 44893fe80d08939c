"""What an error about names of weights can say of whose they are, and of what would make them fit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from vitfast.weights.names import INSIDE, without_wrappers
from vitfast.weights.vit_pytorch import OWN_BLOCKS, ours

CONVERTED = "timm.models.vision_transformer.checkpoint_filter_fn(state_dict, timm_model) gives them timm's"
READ = "vitfast.load builds the model that they are of, and vitfast.load_checkpoint puts them into one that is there"
HUGGING_FACES = (
    r"(^|\.)(embeddings\.patch_embed(ding)?s?|layers?\.\d+\.(self_attn|attention)\.(attention\.)?(q_proj|query))\."
)
CURRENT = "vitfast.ViT takes those of its ViT since release 1.4, and of no other of its models"
# (a key that only this layout has, whose layout it is, how to get to ours)
LAYOUTS = (
    (HUGGING_FACES, "Hugging Face's transformers", READ),
    (r"(^|\.)transformer\.resblocks\.\d", "OpenAI's CLIP and open_clip", READ),
    (r"(^|\.)encoder\.layers\.encoder_layer_\d", "torchvision", READ),
    (r"(^|/)Transformer/encoderblock_\d", "JAX", READ),
    (r"(^|\.)decoder_blocks\.\d", "masked autoencoders (MAE)", READ),
    (rf"^{OWN_BLOCKS}", "vit-pytorch", CURRENT),
    (r"^(register_tokens$|blocks\.\d+\.mlp\.w12\.)", "facebook's DINOv2", READ),
    (r"^(preprocessor\.patchifier|radio_model|beit3|encoder\.beit3)\.", "AIMv2, RADIO or BEiT-3", CONVERTED),
)


def layout_hint(foreign: list[str]) -> str:
    """Whose names these are, where they are known."""
    for pattern, whose, how in LAYOUTS:
        if any(re.search(pattern, key) for key in foreign):
            return f" These weights have the names of {whose}: {how}"
    return ""


def prefixes(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> dict[str, bool]:
    """What stands before most of the model's weights, each with whether the whole model is there and nothing else.

    Where one of them has another shape there is no such prefix: who takes it off gets the next error.
    """
    rename, found = own_name(own), Counter[str]()
    fitting: dict[str, bool] = {}
    for key in state_dict:
        ends = (dot.end() for dot in re.finditer(r"\.", key))
        found.update([key[:end] for end in ends if rename(key[end:]) in own][:1])
    for prefix in (prefix for prefix, count in found.items() if 2 * count > len(own)):
        inside = {rename(key[len(prefix) :]): value for key, value in state_dict.items() if key.startswith(prefix)}
        if all(_fits(value, own[name], name) for name, value in inside.items() if name in own):
            fitting[prefix] = inside.keys() == own.keys()
    return fitting


def own_name(own: Mapping[str, Tensor]) -> Callable[[str], str]:
    """The model's name for one of its weights: without a wrapper's part, and for vit-pytorch's where it has those."""
    translate = ours if "patch_embed.input_norm.weight" in own else str
    return lambda key: translate(INSIDE.sub("", key))


def _fits(value: Any, own: Tensor, name: str) -> bool:
    if not isinstance(value, Tensor):
        return False
    # load_checkpoint resamples positions; older releases of vit-pytorch had one dim more
    return is_lazy(own) or name == "pos_embed" or value.shape == own.shape or value.shape == (1, *own.shape)


def prefix_hints(state_dict: Mapping[str, Any], own: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before the model's keys, or within them, and would have to be taken off."""
    there = prefixes(state_dict, own)
    takes = [f"key={p[:-1]!r}{'' if whole else ', strict=False'}" for p, whole in there.items()]
    if len(there) > 1:
        under = " and ".join(f"under {prefix!r}" for prefix in there)
        yield f"(such weights stand {under}: pass one of them; load_checkpoint takes {takes[0]})"
        return
    for prefix, whole in there.items():
        if whole and all(key.startswith(prefix) for key in state_dict):
            put = ", which a wrapper put there" if not without_wrappers(prefix) else ""
            yield f"(every key starts with {prefix!r}{put}: take it off)"
        else:
            yield f"(such weights stand under {prefix!r}: pass them alone; load_checkpoint takes {takes[0]})"
    if not there:
        foreign = [key for key in state_dict if key not in own]
        inside = {f"{found[2]}." for key in foreign if (found := INSIDE.search(key)) and INSIDE.sub("", key) in own}
        if inside:
            yield f"(keys hold {' and '.join(map(repr, sorted(inside)))}, which a wrapper put there: take it off)"
