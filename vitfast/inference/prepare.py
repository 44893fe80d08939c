"""Frozen inference: `prepare` packs a model's weights once, and what it returns refuses to run on stale ones."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitfast import reference
from vitfast.inference.arguments import device_of, dtype_of, folds, graphs_for, normalisation_of, set_threads
from vitfast.inference.cpu_block import PackedBlock, PackedLinear, PackedStem, frozen, own_blocks, own_product, refuse
from vitfast.inference.cuda_graphs import capturing
from vitfast.inference.gpu_block import AddedLinear, FoldedBlock, FoldedLinear, Stream, carry
from vitfast.inference.graphs import Graphs, Report
from vitfast.inference.original import Source
from vitfast.kernels import cpu as cpu_kernels
from vitfast.model.block import Block, given, with_causal
from vitfast.model.layers import reasons_of
from vitfast.model.patch_embed import check_pixels
from vitfast.model.plain import METHODS, PLAIN_TENSORS, any_global_hook, plain, replaced, watched_view
from vitfast.model.vit import ViT

TOKENS = ("cls_token", "reg_token", "dist_token", "pos_embed")
# copied, in the new dtype: whatever somebody put there runs as it would have
COPIED = ("patch_embed", "norm_pre", "norm", "attn_pool", "fc_norm", "to_latent", "head", "head_dist")
# left out, unless somebody watches them or put something else there
DROPS = ("pos_drop", "patch_drop", "head_drop")
# of these, for a few rows packed is many times as fast
HEADS = ("head", "head_dist")
KEPT_GRIDS = 32
_MODES = torch._C._TorchDispatchModeKey
TRACERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)


def prepare(
    model: ViT,
    dtype: torch.dtype | str | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    threads: int | str | None = "auto",
    graphs: bool | str = "auto",
    views: bool = False,
) -> PreparedViT:
    """A frozen copy of `model` for inference, with weights in the layout that the device's kernels read fastest.

    On a CPU with AVX-512 a block runs in C++ kernels: the norm is computed where its product reads it, what follows a
    product is done to its sums, and an MLP's hidden values stay in the cache. Elsewhere oneDNN multiplies, and in bf16
    with AMX where that was faster: blocks of both kinds are timed here, once a process. LayerScale is multiplied into
    the weights; with pooling by class token the last block computes nothing else. Every thread that calls kernels keeps
    up to 32 MiB of scratch memory.

    On a GPU the parameters of norms and LayerScale are multiplied into the weights, and a block is five Triton kernels:
    qkv, attention, proj, fc1, fc2; what a norm has to know of a row, the product that wrote the row has left. In fp32,
    and where a kernel is not to run, the model's ops compute the same. `forward` and `forward_features` are replayed
    from CUDA graphs, one for each kind of call, which the first such call captures: `PreparedViT.capture`.

    The copy has the methods of the model (forward_features, forward_intermediates, ...), runs as in eval mode, without
    gradients, and takes images in any float dtype, or in uint8.

    The original stays as it is and may be dropped. While it lives it must not change: a call raises when a parameter
    or a module of it was replaced, moved or written to, as far as torch can tell. Writing through `.data` or numpy
    leaves no trace, and attributes (eps, scale, hooks registered later) are not watched.

    Args:
        model: a `vitfast.ViT` in eval mode, on a CPU or a CUDA device, in fp32, fp16 or bf16.
        dtype: of weights, tokens and result: torch.float32, torch.bfloat16, on a GPU torch.float16, 'auto' (bfloat16 on
            a GPU and where the CPU multiplies it, float32 elsewhere), or None for the model's own.
        mean, std: per channel, for uint8 images, which become (images / 255 - mean) / std; by default those of
            `model.pretrained_cfg`, where `create_model` made one.
        threads: for torch in this whole process, with a model on a CPU. 'auto' lowers torch's number to the cores that
            affinity and container leave to the process, for more threads than cores run at a fraction of the speed;
            None changes nothing.
        graphs: whether calls are replayed from CUDA graphs: 'auto', on a GPU where nothing in the model may need its
            Python to run or read two images at once; True, on a GPU; False, never.
        views: return results of graphs where the graphs keep them, in place of copies: the next call overwrites them.

    Returns:
        The prepared model; `packed_bytes`, `dtype` and `str()` tell what it is.

    Raises:
        TypeError: model, dtype, mean, std, threads or graphs is of the wrong kind.
        ValueError: mean and std do not fit the model; graphs or views of a model that is not on a GPU.
        NotImplementedError: another device or dtype; bfloat16 on a CPU that does not compute it; a block with
            hooks, adapters, replaced or patched parts; a part in train mode; parameters that are sharded, subclassed
            or made in inference mode. Each with its name and the reason.
    """
    if not isinstance(model, ViT):
        raise TypeError(f"prepare: model must be a vitfast.ViT, got {type(model).__name__}")
    reasons = why_not(model)
    if reasons:
        more = f" (and {len(reasons) - 5} more)" if len(reasons) > 5 else ""
        raise NotImplementedError(f"prepare: this model cannot be frozen: {'; '.join(reasons[:5])}{more}")
    device = device_of(model)
    dtype = dtype_of(model, dtype, device)
    replays = graphs_for(device, graphs, views)
    normalisation = normalisation_of(model, mean, std)
    if device.type == "cpu":
        set_threads(threads)
    if normalisation is not None:
        normalisation = normalisation[0].to(device), normalisation[1].to(device)
    with torch.no_grad():
        prepared = PreparedViT(model, dtype, normalisation)
        if replays is not None:
            prepared.graphs = Graphs(prepared, replays, dtype, views, insist=graphs is True)
        return prepared


def why_not(model: ViT) -> list[str]:
    """What keeps `model` from being prepared, in words."""
    reasons = [f"{name} {why}" for name, p in model.named_parameters() for why in _unusable(p)]
    reasons += [f"{name} was made in inference mode" for name, b in model.named_buffers() if b.is_inference()]
    if type(model) is not ViT:
        reasons.append(f"it is a {type(model).__name__}, whose own methods would be ignored (prepare a plain ViT)")
    elif why := why_not_plain_here(model):
        reasons.append(f"the model {why}")
    if any_global_hook():
        reasons.append("a global module hook is registered")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        what = "it" if training[0] == "" else training[0]
        reasons.append(f"{what} is in train mode, and a prepared model runs as in eval mode: prepare(model.eval())")
    reasons += reasons_of([("blocks", model.blocks, nn.Sequential)])
    for i, block in enumerate(model.blocks if isinstance(model.blocks, nn.Sequential) else ()):
        parts = block.parts() if type(block) is Block else []
        parts_with_methods: list[tuple[str, Any]] = [(".attn", block.attn), (".mlp", block.mlp)] if parts else []
        for name, part in [("", block), *parts_with_methods]:
            reasons += [f"blocks.{i}{name} has a patched {method}" for method in _patched(part)]
        reasons += [f"blocks.{i}{why}" for why in reasons_of([("", block, Block)])]
        reasons += [f"blocks.{i}.{why}" for why in reasons_of(parts)]
    return reasons


def why_not_plain_here(model: ViT) -> str | None:
    """`why_not_plain` of the model itself, whose forward is a chain of methods that somebody may have patched."""
    changed = [name for name in METHODS if replaced(model, name)]
    if changed:
        return f"has a patched {changed[0]}"
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        if getattr(model, hooks):
            return f"has {hooks.strip('_').replace('_', ' ')}"
    for name in model.__dict__.get("_views", {}):
        if watched_view(model, name) is not None:
            return f"has a {name} with hooks"
    return None


def _patched(module: nn.Module) -> list[str]:
    """Methods of its class that something of its own stands before; `forward` is looked at elsewhere."""
    return [name for name in vars(module) if callable(getattr(type(module), name, None)) and name != "forward"]


def _unusable(p: Tensor) -> list[str]:
    reasons = []
    if type(p) not in PLAIN_TENSORS:
        reasons.append(f"is a {type(p).__name__}, a sharded or subclassed tensor")
    elif p.is_inference():
        reasons.append("was made in inference mode, where torch does not count changes")
    elif p.device.type not in ("cpu", "cuda"):
        reasons.append(f"is on {p.device}; models on CPUs and CUDA devices can be prepared")
    elif p.dtype not in cpu_kernels.FLOATS:
        reasons.append(f"is {str(p.dtype)[6:]}; float32, bfloat16 and float16 can be prepared")
    return reasons


def _check_place(x: Any, device: torch.device) -> None:
    """Kernels read addresses: anything but a plain tensor on the weights' device would be read from nowhere."""
    if not isinstance(x, Tensor):
        return  # said by the model, with the names it has
    if x.device != device:
        raise ValueError(f"prepared model: images must be on the {device}, as the weights are, got {x.device}")
    traced = any(torch._C._get_dispatch_mode(mode) is not None for mode in TRACERS)
    if traced or type(x) not in PLAIN_TENSORS or torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"a prepared model cannot be traced or transformed, and takes plain tensors, got {type(x).__name__}"
        )


def mask_of(x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor | None:
    return with_causal(attn_mask, is_causal, x)


class PreparedViT(ViT):
    """What `prepare` returns: a `ViT` that runs on packed weights, and only runs.

    Attributes:
        dtype: of weights, tokens and result.
        packed_bytes: bytes of the packed weights; everything else is copied, in `copied_bytes`.
        graphs: its CUDA graphs, with their limits `most_graphs`, `most_bytes` and `largest_batch`; None where there
            are none.
    """

    BLOCKS = (PackedBlock, FoldedBlock, Block)
    CALLS_VIEWS = False
    graphs: Graphs | None = None

    def __init__(self, model: ViT, dtype: torch.dtype, normalisation: tuple[Tensor, Tensor] | None):
        nn.Module.__init__(self)
        # how the original is called is no matter of the copy
        own = {*vars(nn.Module()), "_views", "_exportable", "_compiled_call_impl"}
        self.__dict__.update({name: value for name, value in vars(model).items() if name not in own})
        self.dtype, self.device = dtype, next(model.parameters()).device
        self.folded = folds(self.device)
        self._own = not self.folded and own_blocks(model, dtype)
        self.normalisation = normalisation
        self.grad_checkpointing = self.distilled_training = False
        for name in TOKENS:
            token = getattr(model, name, None)
            if token is not None:
                # positions keep their dtype: for another image size they are resampled before they are rounded
                token = token.detach().to(token.dtype if name == "pos_embed" else dtype)
                self.register_buffer(name, token.clone())
            elif name not in self.__dict__ and hasattr(model, name):
                self.register_buffer(name, None)
        for name in COPIED:
            if name in model._modules:
                part = model._modules[name]
                self.add_module(name, None if part is None else frozen(part, dtype))
        for name in HEADS:
            head = self._modules.get(name)
            if self.folded or not isinstance(head, nn.Linear) or not plain(head, nn.Linear):
                continue
            if self._own and own_product(dtype, head.in_features):
                self.add_module(name, PackedLinear(head.weight, head.bias, dtype))
        packs_stem = not self.folded and PackedStem.takes(model.patch_embed)
        self.stem = PackedStem(model.patch_embed, dtype, self._own) if packs_stem else None
        for name in DROPS:
            drop = model._modules.get(name)
            off = drop is None or plain(drop, nn.Dropout, nn.Identity)
            self.add_module(name, nn.Identity() if drop is None or off else frozen(drop, dtype))
        self._keep = model._tokens_that_count(dropout_counts=False)
        last = len(model.blocks) - 1
        self.blocks = nn.Sequential(
            *(self._prepared(block, i == last and self._keep is not None) for i, block in enumerate(model.blocks))
        )
        carry(self.blocks)
        self._positions_of: dict[tuple[int, int] | None, Tensor] = {}
        self._source = Source(model)
        for module in self.modules():
            module.training = False

    def _prepared(self, block: Block, splits_qkv: bool) -> nn.Module:
        if not self.folded:
            return PackedBlock(block, self.dtype, splits_qkv, self._own)
        return FoldedBlock(block, self.dtype) if FoldedBlock.takes(block) else frozen(block, self.dtype)

    @property
    def packed_bytes(self) -> int:
        return sum(m.packed_bytes() for m in self.modules() if isinstance(m, PackedLinear)) + self._folded_bytes()

    def _folded_bytes(self) -> int:
        folded = [m for m in self.modules() if isinstance(m, (FoldedLinear, AddedLinear))]
        return sum(m.get_buffer("weight").nbytes for m in folded)

    @property
    def copied_bytes(self) -> int:
        biases = sum(m.bias_bytes() for m in self.modules() if isinstance(m, PackedLinear))
        return biases + sum(t.nbytes for t in (*self.parameters(), *self.buffers())) - self._folded_bytes()

    def extra_repr(self) -> str:
        graphs = "" if self.graphs is None else f", graphs={self.graphs.count()}"
        return (
            f"dtype={self.dtype}, packed={self.packed_bytes / 2**20:.1f} MiB, copied={self.copied_bytes / 2**20:.1f} "
            f"MiB, threads={torch.get_num_threads()}{graphs}"
        )

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images [B, C, H, W], of any float dtype or uint8 -> what the original returns in eval mode, in `dtype`.

        Raises:
            TypeError, ValueError: as the original; uint8 images where mean and std are not known.
            RuntimeError: the original has changed.
        """
        return self._run(self._replayed(self._forward), x, **given(attn_mask, is_causal))

    def _forward(self, x: Tensor, **how: Any) -> Tensor:
        return ViT.forward_head(self, self._features(x, None if how else self._keep, **how))

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Images -> all tokens [B, N, D] after the final norm."""
        return self._run(self._replayed(self._features), x, **given(attn_mask, is_causal))

    def _replayed(self, method: Callable) -> Callable:
        return method if self.graphs is None else functools.partial(self.graphs.run, self, method)

    def capture(
        self,
        batch: int | Iterable[int] = 1,
        size: int | tuple[int, int] | None = None,
        dtype: torch.dtype | None = None,
        *,
        channels_last: bool = False,
        features: bool = False,
    ) -> None:
        """Capture a CUDA graph before the first such call comes, or see that there is one.

        Without this a first call does it, which takes as long as some calls, and compiles what it needs. Graphs of
        fewer images find their memory among that of graphs of more.

        Args:
            batch: numbers of images.
            size: of images, in pixels; by default the model's.
            dtype: of images: torch.uint8, or any float dtype, the default, which are one.
            channels_last: layout of images.
            features: of `forward_features`, in place of `forward`.

        Raises:
            RuntimeError: there is no such graph; with the reason.
            ValueError: graphs are off; what is wrong with the images.
        """
        for number in sorted([batch] if isinstance(batch, int) else batch, reverse=True):
            self._captured(number, size, dtype, channels_last, features)

    def input_buffer(
        self, batch: int = 1, size: int | tuple[int, int] | None = None, dtype: torch.dtype | None = None, *,
        channels_last: bool = False, features: bool = False,
    ) -> Tensor:  # fmt: skip
        """Images [batch, C, H, W] as the graph of such calls reads them: given to the model, they are not copied.

        Every other call may write there: fill it before each call, and from one thread only. It is in the model's dtype
        or uint8; the arguments and errors are `capture`'s.
        """
        return self._captured(batch, size, dtype, channels_last, features)

    def _captured(self, batch: int, size: Any, dtype: Any, channels_last: bool, features: bool) -> Tensor:
        """Where the graph for such images reads them; captured now if there is none."""
        if self.graphs is None:
            raise ValueError("CUDA graphs are off: of a model on a CPU, or by prepare(..., graphs=False)")
        if not isinstance(batch, int) or isinstance(batch, bool) or batch < 1:
            raise ValueError(f"batch must be an int of at least 1, got {batch!r}")
        layout = torch.channels_last if channels_last else torch.contiguous_format
        height, width = (size, size) if isinstance(size, int) else size or self.config.image_size
        images = torch.zeros(batch, self.in_chans, height, width, dtype=dtype or self.dtype, device=self.device)
        images, method = images.to(memory_format=layout), self._features if features else self._forward
        self._run(self._replayed(method), images)
        return self.graphs.static(self, method, images)

    def graph_report(self) -> Report | None:
        """Which CUDA graphs there are, what they hold of memory, and which calls had none, why; None without graphs."""
        return None if self.graphs is None else self.graphs.report()

    def drop_graphs(self) -> None:
        """Give the memory of all graphs back; later calls capture anew."""
        if self.graphs is not None:
            self.graphs.drop()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens after the final norm -> logits, or with `pre_logits` the features before the classifier."""
        return self._run(super().forward_head, x, pre_logits)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._run(super().forward_intermediates, x, *args, **kwargs)

    def intermediates(self, x: Tensor) -> dict[str, Tensor]:
        return self._run(super().intermediates, x)

    forward_intermediates.__doc__ = ViT.forward_intermediates.__doc__
    intermediates.__doc__ = ViT.intermediates.__doc__

    def _run(self, method: Callable, *args: Any, **kwargs: Any) -> Any:
        self._source.check()
        _check_place(args[0], self.device)
        if isinstance(args[0], Tensor) and args[0].is_neg():
            args = args[0].resolve_neg(), *args[1:]
        if "torch._dynamo" in sys.modules:
            # inside somebody's torch.compile: compilers cannot look into packed weights, so this part stays as it is
            method = torch.compiler.disable(method)
        # not inference_mode: what comes out may go into training, for instance of a head
        with torch.no_grad():
            if not torch.is_autocast_enabled(self.device.type):
                return method(*args, **kwargs)
            with torch.autocast(self.device.type, enabled=False):
                return method(*args, **kwargs)

    def embed(self, images: Tensor) -> Tensor:
        """Images -> tokens [B, P + N, D] that enter the first block."""
        check_pixels(images, takes_uint8=True)
        normalisation = self._normalisation_of(images) if images.dtype is torch.uint8 else None
        if self.stem is None:
            if normalisation is not None and self._embeds_by_op():
                self.patch_embed.check(images, takes_uint8=True)
                return self._before_blocks(self._drop(self._embed_by_op(images, *normalisation)))
            if normalisation is not None:
                images = reference.normalise(images, *normalisation, torch.float32)
            # a replaced stem may give another dtype
            return super().embed(images.to(self.dtype)).to(self.dtype)
        self.patch_embed.check(images, takes_uint8=True)
        images = (images if images.dtype in cpu_kernels.DTYPES else images.to(self.dtype)).resolve_neg()
        positions = self._positions(self._grid_of(images) if self._has_grid() else None)
        x = self.stem(images, positions, self._prefix(), normalisation)
        return self._before_blocks(self._drop(x))

    def _before_blocks(self, x: Tensor) -> Tensor:
        # a replaced norm may give another dtype
        return super()._before_blocks(x).to(self.dtype)

    def _check_images(self, images: Tensor) -> None:
        self.patch_embed.check(images, takes_uint8=True)

    def _normalisation_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """mean and std for these uint8 images."""
        if self.normalisation is None:
            raise ValueError("uint8 images need mean and std: give them to vitfast.prepare")
        channels = len(self.normalisation[0])
        # a stem that somebody put there takes what it takes, and one channel would be stretched to many
        if images.dim() != 4 or images.shape[1] != channels:
            raise ValueError(
                f"ViT: uint8 images must be [B, {channels}, H, W], for which mean and std are known, got "
                f"{list(images.shape)}"
            )
        return self.normalisation

    def _positions(self, grid: tuple[int, int] | None) -> Tensor | None:
        if self.pos_embed is None:
            return None
        positions = self._positions_of.get(grid)  # another thread may clear it
        if positions is None:
            positions = super()._positions(grid).to(self.dtype, copy=True)  # type: ignore[union-attr]  # there are
            # there it would be the graph's memory
            if not capturing(self.device):
                if len(self._positions_of) >= KEPT_GRIDS:
                    self._positions_of.clear()
                self._positions_of[grid] = positions
        return positions

    def _tokens_that_count(self, dropout_counts: bool = True) -> int | None:
        return self._keep

    def _transform(self, x: Tensor, keep: int | None = None, **how: Any) -> Tensor:
        # somebody watches the container of all blocks, or every module
        watched = not plain(self.blocks, nn.Sequential) or any_global_hook()
        if watched or not self.folded:
            return super()._transform(x, keep, **how)
        attn_mask, stream = mask_of(x, **how), Stream(x)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            first = keep if i == last else None
            if plain(block, FoldedBlock):
                stream = block.step(stream, attn_mask, first)
            else:
                stream = Stream(block(stream.whole(), attn_mask, keep=first))
        return stream.normed(self.norm)

    def _run_block(self, block: nn.Module, x: Tensor, keep: int | None = None, **how: Any) -> Tensor:
        # the container of all blocks, which somebody watches
        return block(x) if isinstance(block, nn.Sequential) else block(x, mask_of(x, **how), keep=keep)

    def train(self, mode: bool = True) -> PreparedViT:
        if mode:
            raise NotImplementedError("train: a prepared model only runs; train the original, and prepare it again")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> PreparedViT:
        if requires_grad:
            raise NotImplementedError("requires_grad_: a prepared model has no gradients; use the original")
        return self

    _apply = refuse("moving or converting")
    state_dict = refuse("state_dict")
    load_state_dict = refuse("load_state_dict")
    reset_classifier = refuse("reset_classifier")
    set_input_size = refuse("set_input_size")
    prune_intermediate_layers = refuse("prune_intermediate_layers")
    set_grad_checkpointing = refuse("set_grad_checkpointing")
    set_distilled_training = refuse("set_distilled_training")
    set_mlp_recompute = refuse("set_mlp_recompute")
    set_drop_path_subset = refuse("set_drop_path_subset")
    init_weights = refuse("init_weights")
    __prepare_scriptable__ = refuse("torch.jit.script")
    __reduce_ex__ = refuse("copying or pickling")
    __deepcopy__ = refuse("copying or pickling")
