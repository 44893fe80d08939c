"""How an op of vitfast becomes known to torch, and the list that `vitfast info` prints."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitfast.choose import dispatch
from vitfast.choose.exportable import exporting, say_needs_vitfast
from vitfast.kernels import cpu as cpu_kernels
from vitfast.kernels import extension
from vitfast.kernels.cuda import patch_embed
from vitfast.kernels.plans import Plans
from vitfast.ops._launch import INTERPRETED

LIBRARY = torch.library.Library("vitfast", "DEF")
AUTOGRAD_AND_VIEWS = torch._C.DispatchKeySet(torch._C.DispatchKey.ADInplaceOrView)
for _key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
    AUTOGRAD_AND_VIEWS = AUTOGRAD_AND_VIEWS.add(getattr(torch._C.DispatchKey, _key))


class Implementation(NamedTuple):
    """What runs an op on a device: a name, or None and the reason why there is nothing better."""

    path: str
    kernel: str | None
    why_no_kernel: str


# by op, how its autograd.Function is applied
GRADIENTS: dict[Callable, Callable] = {}
IMPLEMENTATIONS: dict[str, dict[str, Implementation]] = {}
# by op, its kernel's name in `dispatch.KERNELS`
CUDA_KERNELS: dict[str, str] = {}

STOCK = "stock PyTorch operators"
NO_CUDA_KERNEL = "its Triton or CUDA kernel is not part of this release"
NO_CPU_KERNEL = "stock operators are as fast, or nearly"


def op(
    schema: str, *, cpu: Callable, cuda: Callable, fake: Callable, cpu_kernel: str | None = None,
    cuda_kernel: str | None = None, why_no_cpu_kernel: str = NO_CPU_KERNEL, planned: bool = False,
) -> Callable:  # fmt: skip
    """Define `vitfast::<schema>` for CPU and CUDA with its shape function; returns the callable op.

    `cpu_kernel` names the C++ kernel that `cpu` uses where the extension is there, `cuda_kernel` the one of
    `dispatch.KERNELS` that `cuda` asks `dispatch.choose` about. With `planned` Triton's launches are planned.

    Registered by `Library.define` and `impl`, not by `custom_op`: the call costs a quarter of the time, and a
    model makes about fifty of them.
    """
    name = schema[: schema.index("(")]
    LIBRARY.define(schema)
    if planned:
        cuda, cpu = Plans(cuda), Plans(cpu) if INTERPRETED else cpu
    LIBRARY.impl(name, cpu, "CPU")
    LIBRARY.impl(name, cuda, "CUDA")
    torch.library.register_fake(f"vitfast::{name}", _noted(fake), lib=LIBRARY)
    if cuda_kernel:
        CUDA_KERNELS[name] = cuda_kernel
    if not name.endswith("_backward"):
        IMPLEMENTATIONS[name] = {
            "cpu": Implementation("C++", cpu_kernel, "")
            if cpu_kernel
            else Implementation(STOCK, None, why_no_cpu_kernel),
            "cuda": Implementation(dispatch.language(cuda_kernel), dispatch.KERNELS[cuda_kernel], "")
            if cuda_kernel
            else Implementation(STOCK, None, NO_CUDA_KERNEL),
        }
    return getattr(torch.ops.vitfast, name).default


def _noted(fake: Callable) -> Callable:
    """`fake`, which tells exporters what they get: it is the one part of an op that strict export calls too."""

    @functools.wraps(fake)
    def shapes(*args: Any, **kwargs: Any) -> Any:
        if exporting():
            say_needs_vitfast()
        return fake(*args, **kwargs)

    return shapes


def _why_no_cuda_part() -> str:
    return extension.cuda_status()["why"] or "; ".join(patch_embed.device_reasons(torch.device("cuda", 0)))


def implementations() -> dict[str, dict[str, Implementation]]:
    """What runs each op on each device, as this installation is."""
    found = {}
    for name, devices in IMPLEMENTATIONS.items():
        found[name] = dict(devices)
        if devices["cpu"].kernel is not None and cpu_kernels.kernels() is None:
            why = f"no extension: {extension.load()[1]}"
            found[name]["cpu"] = Implementation(STOCK, None, why)
        elif cpu_kernels.tiled(torch.bfloat16) and name.startswith(("attention", "linear", "mlp")):
            found[name]["cpu"] = devices["cpu"]._replace(path=f"{devices['cpu'].path} ({_which_of_tiles(name)})")
        elif name.startswith("attention") and cpu_kernels.has_amx(torch.bfloat16):
            found[name]["cpu"] = devices["cpu"]._replace(path=f"C++ (bf16: {STOCK}, which have AMX)")
        if name in CUDA_KERNELS and (why := _why_stock_on_cuda(CUDA_KERNELS[name])):
            found[name]["cuda"] = Implementation(STOCK, None, why)
    return found


def _which_of_tiles(name: str) -> str:
    where = "bf16" if name.startswith("attention") else "bf16 in inference"
    if cpu_kernels.settled():
        return f"{where}: C++ by tiles, as VITFAST_CPU_ISA says"
    return f"{where}: C++ with AMX or {STOCK}, by measurement in each process"


def _why_stock_on_cuda(kernel: str) -> str:
    """Why stock operators run in place of this kernel whatever the shape, "" where they don't."""
    state = dispatch.state(kernel)
    why = _why_no_cuda_part() if dispatch.language(kernel) == "CUDA" else dispatch.why_no_kernels()
    return why or ("" if state.startswith(("auto", "kernel")) else state)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, so that an op has to return what that needs."""
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def call(op: Callable, differentiable: bool, *args: Any) -> Any:
    """`op(*args)` by the shortest way: what torch's dispatcher would find out about autograd at 15 us is known here."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or forward_ad._current_level >= 0:
        return op(*args)
    if torch._C._are_functorch_transforms_active():
        return op(*args)  # by `Function.apply`, which torch.func knows
    if differentiable:
        return GRADIENTS[op](None, *args)
    with below_autograd():
        return op(*args)


def below_autograd() -> Any:
    """Dispatch past autograd and past its bookkeeping of views.

    Without the second part an op's result would count as a view of one that its implementation made on the way, and
    users could not change it in place. The guard is private to torch: there is no public way (torch 2.11).
    """
    return torch._C._ExcludeDispatchKeyGuard(AUTOGRAD_AND_VIEWS)


def must_have_saved(name: str, saves: bool) -> None:
    """Refuse a backward of a raw op call that was told not to prepare one."""
    if not saves:
        raise RuntimeError(f"vitfast::{name} was called without saves, which leaves nothing for its backward")


def autograd(name: str, *, setup_context: Callable, backward: Callable) -> None:
    """Register the gradient of `vitfast::<name>`; the backward calls an op of its own, or where `_higher.wanted`
    computes the same as a graph of stock operators.

    An autograd.Function at the Autograd key, not `torch.library.register_autograd`: the latter reads the schema anew
    at every call, 40 us of the 60 us that an op costs on the host.
    """
    overload = getattr(torch.ops.vitfast, name).default

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, keyset, *inputs):
            with below_autograd():
                if keyset is None:  # from `call`
                    output = overload(*inputs)
                else:
                    output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
            ctx.needed = ctx.needs_input_grad[1:]
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return None, *backward(ctx, *grads)

    Gradient.__name__ = Gradient.__qualname__ = f"{name}_gradient"

    def kernel(keyset, *inputs):
        needs_grad = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in inputs)
        # inside forward-mode AD too: the Function has no such rule and says so, the plain op would drop the tangent
        if needs_grad or forward_ad._current_level >= 0:
            return Gradient.apply(keyset, *inputs)
        with below_autograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    # `Function.apply` looks through all arguments for what torch.func left behind, at 10 us: `call` has no such
    GRADIENTS[overload] = super(torch.autograd.Function, Gradient).apply
    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def no_gradient(name: str) -> None:
    """Make `vitfast::<name>` refuse tensors that want a gradient or carry a tangent; torch would drop both."""
    overload = getattr(torch.ops.vitfast, name).default

    def kernel(keyset, *inputs):
        wanted = wants_gradient(*(t for t in inputs if isinstance(t, Tensor)))
        if wanted or forward_ad._current_level >= 0 and any(isinstance(t, Tensor) and _is_dual(t) for t in inputs):
            raise NotImplementedError(f"vitfast::{name} has neither gradient nor tangent")
        with below_autograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _is_dual(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None
