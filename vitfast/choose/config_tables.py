"""Configurations of the kernels as data, by architecture: chosen by shape, never searched for while a model runs.

Whether a kernel runs, and what was measured to be its fastest configuration, is in `vitfast.choose.builtin`. These are
the configurations that there are, which come from what compiles without spilling (`make aot`); where none was measured
the launchers read them from top to bottom and take the first row that fits. A row holds what a kernel is compiled with.
Architectures: 80 (A100), 89 (its kin with 99 KB of shared memory: RTX 30 to 50, L4, L40), 90 (Hopper), 100.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

ARCHITECTURES = (80, 89, 90, 100)


def architecture_of(capability: tuple[int, int]) -> int:
    """Of devices that are none of the four, one with the least shared memory."""
    major, minor = capability
    return 10 * major if (major, minor) == (8, 0) or major in (9, 10) else 89


def _without_later(fields: dict[str, Any], *later: str) -> dict[str, Any]:
    """Without what came later where it says nothing: records of before have the same words for the same."""
    return {name: value for name, value in fields.items() if name not in later or value}


@dataclass(frozen=True)
class Config:
    """How one kernel is compiled.

    Attributes:
        kernel: "short" or "online" forward; "short", "head" or "blocks" backward.
        block_m: queries in a tile.
        block_n: keys in a tile; 0 where a tile has all of them. Short backward: all keys, in up to three parts, fill a
            multiple of so many; 0: two parts, each a power of two.
        warps, stages: of a program, and of its loop over memory.
        peel: the last block of keys in code of its own, without masks in that of the others.
        loop: a program takes all queries of a head in turn (short forward only).
        registers: of a thread at most, so that more programs share a multiprocessor; 0: as many as the compiler wants
            (forward only).
        delta_first: the sums of grad * out by a kernel of their own, and dq by wgmma (short backward only).
        keys_m, keys_n, keys_warps: the same of the half that makes dk and dv, where that is a kernel of its own.
        descriptors: what a loop reads comes by bulk copies, which want rows at multiples of 16 bytes (online forward
            and blocks backward).
    """

    kernel: str
    block_m: int
    block_n: int = 0
    warps: int = 4
    stages: int = 2
    peel: bool = True
    loop: bool = False
    registers: int = 0
    delta_first: bool = False
    keys_m: int = 0
    keys_n: int = 0
    keys_warps: int = 0
    descriptors: bool = False

    def as_dict(self) -> dict[str, Any]:
        return _without_later(asdict(self), "descriptors")


@dataclass(frozen=True)
class Row:
    """A configuration and what it is for: all limits are inclusive.

    Attributes:
        bits: of an element, 16 or 32.
        width: largest padded head dim.
        keys: largest number of keys.
        programs_at_most: taken only where tiles of 64 queries would be no more programs than this many of a device's
            multiprocessors; 0: always.
        dropout: whether also with dropout, whose random numbers for all keys at once would not fit into registers.
    """

    config: Config
    bits: int = 16
    width: int = 128
    keys: int = 1 << 31
    programs_at_most: float = 0.0
    dropout: bool = True


# so few programs leave most of a device idle: smaller tiles, with less work in each
FEW = 1.0
# below this, one program a head would
SOME = 8.0

# tiles and stages that the compilers of Triton 3.6 and 3.8 both have registers for, in IEEE and in TF32
FORWARD_FP32 = {
    arch: [
        Row(Config("online", 64, 32, warps=8, stages=first, peel=False), bits=32, width=64),
        Row(Config("online", 32, 32, warps=8, stages=second, peel=False), bits=32, width=96),
        Row(Config("online", 32, 16, warps=8, stages=third, peel=False), bits=32),
    ]
    for arch, (first, second, third) in {80: (3, 2, 1), 90: (2, 2, 2), 100: (2, 1, 2)}.items()
}
FORWARD_FEW = [
    Row(Config("online", 16, 64, warps=1), width=64, programs_at_most=FEW, dropout=False),
    Row(Config("online", 16, 32, warps=2), programs_at_most=FEW),
]
# bulk copies need fewer registers; a barrier for each stage takes the room of a fourth program from three stages of 64
FORWARD_BOXES = [
    Row(Config("online", 64, 32, stages=3, registers=96, descriptors=True), width=80, dropout=False),
    Row(Config("online", 64, 64, stages=2, descriptors=True), dropout=False),
    Row(Config("online", 64, 64, stages=3, descriptors=True), dropout=False),
    Row(Config("online", 64, 128, stages=2, descriptors=True), width=80, dropout=False),
    Row(Config("online", 128, 64, warps=8, stages=3, descriptors=True), width=80, dropout=False),
]
FORWARD_BLACKWELL = [
    *FORWARD_FEW,
    Row(Config("short", 64), width=64, keys=272, programs_at_most=SOME, dropout=False),
    Row(Config("online", 128, 64, warps=8), width=64, dropout=False),
]

FORWARD: dict[int, list[Row]] = {
    80: [
        *FORWARD_FEW,
        Row(Config("short", 128, warps=8, stages=1, loop=True), width=64, keys=256, dropout=False),
        Row(Config("online", 64, 64), width=96),
        Row(Config("online", 64, 64, warps=8)),
        *FORWARD_FP32[80],
    ],
    90: [
        Row(Config("short", 64), width=64, keys=272, programs_at_most=SOME, dropout=False),
        Row(Config("online", 64, 32, stages=3, registers=96), width=64, keys=400, dropout=False),
        Row(Config("online", 64, 64, stages=3, registers=128), width=64, dropout=False),
        Row(Config("online", 64, 64, stages=3), width=80, dropout=False),
        Row(Config("online", 64, 64)),
        *FORWARD_FEW,
        Row(Config("short", 64, stages=2, loop=True), width=64, keys=272, dropout=False),
        *FORWARD_BOXES,
        *FORWARD_FP32[90],
    ],
    100: [
        *FORWARD_BLACKWELL,
        Row(Config("online", 64, 64), dropout=False),
        Row(Config("online", 64, 64, warps=8)),
        *FORWARD_FP32[100],
    ],
}
FORWARD[89] = FORWARD[80]

BACKWARD_FP32 = tuple(
    Row(Config("blocks", m, n, warps=8, stages=stages, peel=False, keys_m=km, keys_n=32, keys_warps=kw), 32, width)
    for m, n, stages, km, kw, width in ((64, 32, 2, 32, 8, 64), (32, 32, 1, 16, 4, 80), (16, 16, 1, 16, 8, 128))
)

BACKWARD_HOPPER = Config("blocks", 64, 32, stages=3, keys_m=32, keys_n=64, keys_warps=4)

BACKWARD_BOXES = [
    Row(Config("blocks", 64, n, stages=stages, keys_m=m, keys_n=64, keys_warps=4, descriptors=True), dropout=False)
    for n, stages, m in ((32, 3, 32), (32, 3, 16), (64, 2, 32))
]

BACKWARD: dict[int, list[Row]] = {
    80: [
        Row(Config("blocks", 32, 64, keys_m=32, keys_n=64, keys_warps=4), width=64, programs_at_most=FEW),
        Row(Config("head", 32, 64, stages=1), width=64, keys=256, dropout=False),
        Row(Config("head", 32, 32, stages=1, peel=False), keys=256, dropout=False),
        Row(Config("blocks", 32, 64, keys_m=32, keys_n=64, keys_warps=4), width=64),
        Row(Config("blocks", 32, 32, keys_m=32, keys_n=64, keys_warps=8)),
        *BACKWARD_FP32,
    ],
    90: [
        Row(BACKWARD_HOPPER, programs_at_most=FEW),
        Row(
            Config("blocks", 128, 64, warps=8, keys_m=32, keys_n=64, keys_warps=4),
            width=64,
            keys=400,
            programs_at_most=SOME,
        ),
        Row(BACKWARD_HOPPER, width=64, keys=400),
        Row(Config("blocks", 128, 64, warps=8, stages=3, keys_m=64, keys_n=64, keys_warps=4), width=64, dropout=False),
        Row(BACKWARD_HOPPER),
        Row(Config("blocks", 64, 64, keys_m=64, keys_n=64, keys_warps=4), width=80),
        # a tile that is read for delta too has one buffer, which only a wait for all wgmma of a round keeps until then
        Row(Config("short", 32, warps=8, delta_first=True), width=64, keys=256, dropout=False),
        # 197 keys are 208 and not 256; tiles of 32 queries spill
        Row(Config("short", 16, 16, warps=8, stages=3, delta_first=True), width=64, keys=256, dropout=False),
        *BACKWARD_BOXES,
        *BACKWARD_FP32,
    ],
    100: [
        Row(Config("blocks", 32, 64, keys_m=32, keys_n=64, keys_warps=4), width=64, programs_at_most=FEW),
        Row(Config("blocks", 32, 32, keys_m=32, keys_n=64, keys_warps=4), width=80, programs_at_most=FEW),
        Row(Config("short", 32, warps=8), width=64, keys=256, dropout=False),
        Row(Config("head", 32, 32, stages=1, peel=False), width=80, keys=256, dropout=False),
        # 32 keys of 96 numbers spill with Triton 3.8
        Row(Config("head", 32, 16, stages=1, peel=False), keys=256, dropout=False),
        Row(Config("blocks", 64, 64, keys_m=64, keys_n=64, keys_warps=4), width=80),
        Row(Config("blocks", 64, 64, keys_m=32, keys_n=64, keys_warps=8)),
        *BACKWARD_FP32,
    ],
}
BACKWARD[89] = BACKWARD[80]


def choose(table: list[Row], bits: int, width: int, keys: int, programs: float, dropout: bool) -> Config:
    """The first row that fits. `programs`: tiles of 64 queries, by multiprocessors of the device."""
    for row in table:
        few = not row.programs_at_most or programs <= row.programs_at_most
        fits = bits == row.bits and width <= row.width and keys <= row.keys and few
        if fits and (row.dropout or not dropout):
            return row.config
    raise NotImplementedError(f"no configuration for {bits} bits, head dim {width}, {keys} keys")


def candidates(table: list[Row], bits: int, width: int, keys: int, programs: float) -> list[Config]:
    """All configurations that can run it, that of `choose` first."""
    fits = [row.config for row in table if bits == row.bits and width <= row.width and keys <= row.keys]
    return list(dict.fromkeys([choose(table, bits, width, keys, programs, False), *fits]))


# products


@dataclass(frozen=True)
class Product:
    """How the product of a linear layer is computed.

    Attributes:
        kernel: "tiles": `linear_product.product`; "blas": cuBLAS, and a kernel for what is around it; "whole":
            `mlp_whole.mlp_whole`, whose tiles have all columns and take block_n of the hidden numbers at a time;
            "turns": csrc/cuda/product.cuh, `folded_linear` only, and no choice but a tuned one.
        block_m, block_n, block_k: rows, columns and depth of a tile.
        warps, stages: of a program, and of its loop over the depth.
        parts: columns of a tile are finished in so many parts.
        descriptors: tiles move by bulk copies, which want rows at multiples of 16 bytes.
        persistent: `programs` a multiprocessor, which take tiles in turn.
        swap: the weight's rows are the rows of the matrix instruction, of which it wants 64.
        split: up to so many programs a tile, where tiles are too few.
        programs: of a persistent kernel, a multiprocessor: one multiplies while the other finishes.
        flatten: a persistent kernel's loops over tiles and depth as one, so that the next tile's first loads are under
            way while this one is finished.
        ahead: what a part reads, the residual by pointers, is on its way while the part before it is finished, and that
            of the first while the tile is multiplied.
    """

    kernel: str = "tiles"
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 3
    parts: int = 1
    descriptors: bool = False
    persistent: bool = False
    swap: bool = False
    split: int = 1
    programs: int = 1
    flatten: bool = False
    ahead: bool = False

    def as_dict(self) -> dict[str, Any]:
        return _without_later(asdict(self), "flatten", "ahead")


@dataclass(frozen=True)
class ProductRow:
    """A configuration and what it is for: limits are inclusive.

    Attributes:
        bits: of an element, 16 or 32.
        rows: largest number of rows.
        tiles_at_most: taken only where tiles of 128 x 128 would be no more than this many a multiprocessor; 0: always.
    """

    config: Product
    bits: int = 16
    rows: int = 1 << 31
    tiles_at_most: float = 0.0


# rows of tiles whose columns are taken one after the other
GROUP = 8
BLAS = Product("blas")
# of the kernel after cuBLAS
FINISH = Product("finish", 32, 128, warps=4)

# cuBLAS multiplies fp32 with tiles that no kernel here comes near
PRODUCT_FP32 = [ProductRow(BLAS, bits=32)]
# on Hopper and Blackwell, where rows begin anywhere
PRODUCT_POINTERS = [
    ProductRow(Product("tiles", 16, 64, 64, stages=4, split=8), rows=16),
    ProductRow(Product("tiles", 64, 64, 64, stages=4, split=4), tiles_at_most=1.0),
    ProductRow(Product("tiles", 128, 64, 64, warps=4, stages=4, parts=2)),
]
# on Hopper, where a measurement says so only: tensor cores that do not wait for what follows a product. With four parts
# fewer registers and less shared memory for two programs; loops that are one; what is read for the end read ahead.
# Loops that are one with warps of two groups would overwrite operands (`benchmarks.aot` refuses them)
TWO = Product("tiles", 128, 128, 64, stages=3, parts=4, descriptors=True, persistent=True, programs=2)
PRODUCT_OVERLAPPED = (
    TWO,
    replace(TWO, flatten=True),
    replace(TWO, ahead=True),
    replace(TWO, parts=2, ahead=True),
    Product("tiles", 128, 256, 64, warps=8, parts=4, descriptors=True, persistent=True, ahead=True),
    Product("tiles", 64, 64, 64, stages=4, descriptors=True, ahead=True),
)

PRODUCT: dict[int, list[ProductRow]] = {
    80: [
        ProductRow(Product("tiles", 16, 64, 64, stages=4, split=8), rows=16),
        ProductRow(Product("tiles", 64, 64, 64, stages=3, parts=2, split=4), tiles_at_most=1.0),
        ProductRow(Product("tiles", 128, 128, 64, warps=8, parts=4)),
        *PRODUCT_FP32,
    ],
    89: [
        ProductRow(Product("tiles", 16, 64, 64, stages=4, split=8), rows=16),
        ProductRow(Product("tiles", 64, 64, 64, stages=3, parts=2, split=4), tiles_at_most=1.0),
        ProductRow(Product("tiles", 128, 128, 32, warps=8, parts=4)),
        *PRODUCT_FP32,
    ],
    90: [
        ProductRow(Product("tiles", 16, 64, 128, stages=4, descriptors=True, swap=True, split=8), rows=16),
        ProductRow(Product("tiles", 64, 64, 128, stages=4, descriptors=True, split=4), tiles_at_most=0.2),
        ProductRow(Product("tiles", 64, 128, 64, stages=4, parts=2, descriptors=True), tiles_at_most=1.0),
        ProductRow(Product("tiles", 128, 128, 64, stages=3, parts=2, descriptors=True, persistent=True, programs=2)),
        ProductRow(Product("tiles", 128, 128, 64, warps=8, stages=3, parts=2, descriptors=True)),
        ProductRow(Product("tiles", 128, 256, 64, warps=8, parts=4, descriptors=True, persistent=True)),
        *(ProductRow(config) for config in PRODUCT_OVERLAPPED),
        *PRODUCT_POINTERS,
        *PRODUCT_FP32,
    ],
    100: [
        ProductRow(Product("tiles", 16, 64, 128, stages=4, descriptors=True, swap=True, split=8), rows=16),
        ProductRow(Product("tiles", 64, 64, 128, stages=4, descriptors=True, split=4), tiles_at_most=1.0),
        ProductRow(
            Product("tiles", 128, 128, 64, warps=8, stages=4, parts=2, descriptors=True, persistent=True),
            tiles_at_most=4.0,
        ),
        ProductRow(Product("tiles", 128, 256, 64, warps=8, parts=4, descriptors=True, persistent=True)),
        ProductRow(TWO),
        *PRODUCT_POINTERS,
        *PRODUCT_FP32,
    ],
}


def _product_rows(arch: int, bits: int, M: int, N: int, multiprocessors: int, aligned: bool) -> list[Product]:
    tiles = -(-M // 128) * -(-N // 128) / multiprocessors
    return [
        row.config
        for row in PRODUCT[arch]
        if bits == row.bits
        and row.rows >= M
        and (not row.tiles_at_most or tiles <= row.tiles_at_most)
        and (aligned or not row.config.descriptors)
    ]


def some_choice(arch: int, config: Product) -> bool:
    """Whether some shape runs this configuration where nobody tuned: a row before it may leave nothing to it."""
    for row in PRODUCT[arch]:
        if row.config == config:
            return True
        takes_all = row.rows == 1 << 31 and not row.tiles_at_most and row.bits == 16
        if takes_all and (config.descriptors or not row.config.descriptors):
            return False
    return False


def product_config(arch: int, bits: int, M: int, N: int, K: int, multiprocessors: int, aligned: bool) -> Product:
    """The first row that fits a product [M, K] x [K, N]; aligned: rows begin at multiples of 16 bytes."""
    return _product_rows(arch, bits, M, N, multiprocessors, aligned)[0]


def product_candidates(
    arch: int, bits: int, M: int, N: int, K: int, multiprocessors: int, aligned: bool
) -> list[Product]:
    """All configurations that can run it, that of `product_config` first."""
    fits = _product_rows(arch, bits, M, N, multiprocessors, aligned)
    others = [row.config for row in PRODUCT[arch] if row.bits == bits and (aligned or not row.config.descriptors)]
    return list(dict.fromkeys([*fits, *others, BLAS]))


# both layers of an MLP in one kernel, by width and architecture. Tiles of 32 rows, all that fits on sm_80 and sm_89,
# read the weights too often to be the built-in choice; `vitfast tune` tries them
WHOLE: dict[int, dict[int, Product]] = {
    80: {192: Product("whole", 32, 32, warps=4, stages=2)},
    90: {
        192: Product("whole", 128, 64, warps=8, stages=2, descriptors=True),
        384: Product("whole", 64, 32, warps=8, stages=2, descriptors=True),
    },
}
WHOLE[89] = WHOLE[80]
WHOLE[100] = WHOLE[90]
# widths at which that is the careful choice (`vitfast.choose.builtin`), on the architectures with wide tiles; at 384
# the weights cross the L2 cache twice as often as two products take in all
WHOLE_FIRST = {90: (192,), 100: (192,)}
