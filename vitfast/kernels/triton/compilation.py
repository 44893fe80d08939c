"""One way to compile a kernel, as data: what `make aot` compiles without a GPU, and `vitfast.warmup` with one."""

from __future__ import annotations

from typing import Any, NamedTuple


class Compilation(NamedTuple):
    """A kernel with everything that decides about its machine code.

    Attributes:
        name: unique within a module; says kernel, dtype, sizes and configuration.
        kernel: the function under `triton.jit`.
        signature: type of each argument that is no constant: "*bf16", "*fp32", "*i32", "i32", "i64", "fp32".
        constants: value of each `tl.constexpr` argument.
        divisible: arguments that are multiples of 16 (a pointer: of 16 bytes) at every launch this stands for.
        warps, stages, registers: `num_warps`, `num_stages` and `maxnreg` of `triton.Config`; 0 registers: no limit.
        default: whether some shape runs it where nobody tuned anything. Such a one must not spill.
        ieee: whether it promises fp32 products without TF32.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: tuple[str, ...]
    warps: int
    stages: int
    default: bool = True
    ieee: bool = False
    registers: int = 0
