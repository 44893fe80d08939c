"""Which stages a model has: by the adapter of its class, or where there is none by hooks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vitfast.check.acceptance import FORMULA, apart
from vitfast.checkpoints.checkpoint import unwrapped
from vitfast.parity.adapters import ADAPTERS
from vitfast.parity.adapters.adapter import UnknownPart, class_name
from vitfast.parity.adapters.hugging_face import BASES, resamples
from vitfast.parity.chain import Chain

# of a model that is not known: its blocks are a list of at least so many modules of one class
BLOCKS = 1


def exact_chain(model: nn.Module, images: Tensor) -> tuple[Chain, dict[str, Tensor]]:
    """The stages of a model in fp64, and their values.

    Its stages can be run one by one where its class is known and they give what its own forward gives. Of another
    module values are read by hooks, and the chain says so.

    Args:
        model: in evaluation mode. images: fp64, [B, C, H, W].

    Raises:
        ValueError, RuntimeError, TypeError: as its forward, for images that it cannot take.
    """
    inner = unwrapped(model)
    notes = (
        (f"{class_name(inner)}: in fp64 by sdpa, for its eager attention is in fp32",) if without_fp32(inner) else ()
    )
    chain, why = _by_class(inner, images)
    if chain is not None:
        try:
            values = chain.staged(images)
        except (RuntimeError, AttributeError, TypeError, IndexError, ValueError) as error:
            own = dict(chain.read(images))
            why = f"cannot be run stage by stage ({str(error).splitlines()[0]})"
        else:
            own = dict(chain.read(images))
            ((last, value),) = own.items()
            # NaN has no distance
            if values[last].shape == value.shape and (apart(values[last], value) <= FORMULA or value.isnan().any()):
                return replace(chain, notes=notes), values | own
            why = "run stage by stage gives other values than its forward"
    chain = hooked(inner, why)
    return replace(chain, notes=notes + chain.notes), chain.values(images)


def chain_like(exact: Chain, model: nn.Module, images: Tensor) -> Chain:
    """The chain of the same model in another dtype."""
    inner = unwrapped(model)
    if exact.stages:
        chain, why = _by_class(inner, images)
        if chain is None:
            raise RuntimeError(f"{exact.whose} {why}, but not so in fp64")
        return chain
    return hooked(inner, "")


def stage_values(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """The value of each stage that `ViT.intermediates` names, of a model whose class is known, as it is.

    Raises:
        ValueError: its class is not known, or one of its parts.
    """
    chain, why = _by_class(unwrapped(model), images)
    if chain is None:
        raise ValueError(f"stage_values: model must be one of {', '.join(ADAPTERS)}, got one that {why}")
    values = chain.values(images)
    del values["patches"]
    return values


def _by_class(inner: nn.Module, images: Tensor) -> tuple[Chain | None, str]:
    """By the adapter of its class; None and why where there is none that does."""
    adapter = next((ADAPTERS[name] for kind in type(inner).__mro__ if (name := _name(kind)) in ADAPTERS), None)
    if adapter is None:
        return None, "is no class that is known"
    try:
        stages = adapter(inner, images)
    except (UnknownPart, AttributeError, TypeError, ValueError) as error:
        return None, str(error)
    last, read = _output_of(inner)
    last = stages[-1].name if last is None else last
    return Chain(class_name(inner), stages, lambda x: {last: read(x)}), ""


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _output_of(model: Any) -> tuple[str | None, Callable[[Tensor], Tensor]]:
    """The stage that the model's forward gives, None for the last that it has, and how to get its value."""

    def read(x: Tensor) -> Tensor:
        out = model(x, **({"interpolate_pos_encoding": True} if resamples(model, x) else {}))
        return out if isinstance(out, Tensor) else _tensor_in(out)

    pooler = model._modules.get("pooler") if _name(type(model)).startswith("transformers.") else None
    return ("tokens" if pooler is not None else None), read


def _tensor_in(out: Any) -> Tensor:
    """The logits of what a model of transformers returns, or its tokens, or the first tensor of a tuple.

    Raises:
        TypeError: there is none.
    """
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return found
    if isinstance(out, (tuple, list)) and out and isinstance(out[0], Tensor):
        return out[0]
    raise TypeError(f"compare: a model must return a tensor, or an output with logits, got {type(out).__name__}")


def hooked(model: nn.Module, why: str) -> Chain:
    """Values of a model whose parts cannot be run one by one: what enters and leaves its blocks, and its output.

    why: what a reader is told of the model; "" for nothing.
    """
    name, blocks = _blocks_of(model)
    output = _output_of(model)[1]
    how = (
        f"its values are read by hooks on {name}.0 to {name}.{len(blocks) - 1}" if blocks else "only its output is seen"
    )

    def read(images: Tensor) -> Mapping[str, Tensor]:
        taps: dict[str, Tensor] = {}
        handles = []
        for i, block in enumerate(blocks):
            if i == 0:
                handles.append(
                    block.register_forward_pre_hook(lambda _, args: taps.setdefault("patch_tokens", args[0]))
                )
            handles.append(
                block.register_forward_hook(lambda _, __, out, at=f"blocks.{i}.mlp": taps.update({at: _first(out)}))
            )
        try:
            taps["logits"] = output(images)
        finally:
            for handle in handles:
                handle.remove()
        return {at: value for at, value in taps.items() if isinstance(value, Tensor)}

    return Chain(class_name(model), (), read, (f"{class_name(model)} {why}: {how}",) if why else ())


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, (tuple, list)) and out else out


def _blocks_of(model: nn.Module) -> tuple[str, list[nn.Module]]:
    """The longest list of modules of one class that have modules inside."""
    best: tuple[str, list[nn.Module]] = ("", [])
    for name, module in model.named_modules():
        inside = list(module.children())
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or len(inside) < BLOCKS:
            continue
        alike = len({type(child) for child in inside}) == 1 and any(inside[0].children())
        runs = not isinstance(inside[0], nn.ModuleList)
        if alike and runs and len(inside) > len(best[1]):
            best = name, inside
    return best


def off_grid(model: Any, images: Tensor) -> bool:
    """Whether the model has learned positions for images of another size."""
    inner = unwrapped(model)
    base = next((inner._modules[name] for name in BASES if name in inner._modules), inner)
    stem = base._modules.get("patch_embed") or getattr(base._modules.get("embeddings"), "patch_embeddings", None)
    sizes = [getattr(stem, name, None) for name in ("img_size", "image_size")]
    return any(size is not None and tuple(size) != tuple(images.shape[2:]) for size in sizes)


def without_fp32(model: Any) -> bool:
    """Let attention compute in its own dtype: transformers' eager one has its softmax in fp32. Whether it did not."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "eager":
        return False
    config._attn_implementation = "sdpa"  # type: ignore[union-attr]  # there, as it has the attribute
    return True
