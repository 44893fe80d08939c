"""The part of pickle in which torch writes weights, read without importing or running anything that a file names."""

from __future__ import annotations

import math
import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vitfast.checkpoints.zipped import LONGEST

# torch refuses files that name them, and so does whoever looks into one
BLOCKED = ("sys", "os", "posix", "nt")
STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64, "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip
PLAIN = ("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer")
# steps and names of classes in a pickle: each takes more memory than bytes of the file
STEPS, CLASSES = 20_000_000, 10_000
LATIN = ("latin1", "latin-1")


class Unread(dict):
    """Stands in for an object that is neither a tensor nor plain data; keeps the items of a mapping, nothing else."""

    __hash__ = object.__hash__  # type: ignore[assignment]  # a dict has none, and pickled sets hold such objects


class Storage(NamedTuple):
    """The bytes that tensors are views of, and the dtype that they were saved in."""

    data: torch.UntypedStorage
    dtype: torch.dtype


class Kind(NamedTuple):
    """A name that stands for no call: of a storage or of a class of tensors."""

    dtype: torch.dtype | None = None


class Unpickler:
    """Reads one pickle after the other.

    Of names a file may use those of tensors and of Python's containers; every other stands for an inert class of its
    own name. No tensor reaches beyond its storage, and all together don't claim more than a file of this size can hold.

    Args:
        data: the bytes of the file or of its pickle.
        storage: called with the id of a storage, returns it.
        claims: how many bytes all tensors may have.
    """

    def __init__(self, data: bytes | mmap, storage: Callable[[tuple], Storage], claims: int):
        self.data, self.at, self.storage, self.claims = data, 0, storage, claims
        self.unknown: dict[str, type[Unread]] = {}

    def read(self, count: int) -> bytes:
        part = self.data[self.at : self.at + count]
        self.at += count
        if len(part) < count:
            raise EOFError("it ends in the middle of a pickle")
        return part

    def line(self) -> str:
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise EOFError("it ends in the middle of a name")
        return self.read(end - self.at + 1)[:-1].decode()

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.read(struct.calcsize(form)))[0]

    def load(self) -> Any:
        """The next object.

        Raises:
            Exception: of any class; a damaged or hostile file can do that.
        """
        stack: list[Any] = []
        marks: list[list[Any]] = []
        memo: dict[int, Any] = {}
        last, left = self.at + LONGEST, STEPS

        def marked() -> list[Any]:
            nonlocal stack
            items, stack = stack, marks.pop()
            return items

        while self.at < last and left:
            left -= 1
            match self.read(1):
                case b"\x80":  # PROTO
                    self.read(1)
                case b"N":
                    stack.append(None)
                case b"\x88":
                    stack.append(True)
                case b"\x89":
                    stack.append(False)
                case b"J":
                    stack.append(self.number("<i"))
                case b"K":
                    stack.append(self.number("<B"))
                case b"M":
                    stack.append(self.number("<H"))
                case b"G":
                    stack.append(self.number(">d"))
                case b"\x8a":  # LONG1
                    stack.append(int.from_bytes(self.read(self.number("<B")), "little", signed=True))
                case b"X":  # BINUNICODE
                    stack.append(str(self.read(self.number("<I")), "utf-8", "surrogatepass"))
                case b"U":  # SHORT_BINSTRING
                    stack.append(self.read(self.number("<B")).decode())
                case b")":
                    stack.append(())
                case b"]":
                    stack.append([])
                case b"}":
                    stack.append({})
                case b"\x8f":
                    stack.append(set())
                case b"(":
                    marks.append(stack)
                    stack = []
                case b"t":
                    items = marked()
                    stack.append(tuple(items))
                case b"\x85" | b"\x86" | b"\x87" as code:  # TUPLE1 to TUPLE3
                    stack[-(code[0] - 0x84) :] = [tuple(stack[-(code[0] - 0x84) :])]
                case b"a":
                    item = stack.pop()
                    extend(stack[-1], [item])
                case b"e":
                    items = marked()
                    extend(stack[-1], items)
                case b"s":
                    items = [stack.pop(-2), stack.pop()]
                    fill(stack[-1], items)
                case b"u":
                    items = marked()
                    fill(stack[-1], items)
                case b"h":
                    stack.append(memo[self.number("<B")])
                case b"j":
                    stack.append(memo[self.number("<I")])
                case b"q":
                    memo[self.number("<B")] = stack[-1]
                case b"r":
                    memo[self.number("<I")] = stack[-1]
                case b"c":
                    stack.append(self.named(self.line(), self.line()))
                case b"R" | b"\x81":  # REDUCE, NEWOBJ
                    args = stack.pop()
                    stack[-1] = self.made(stack[-1], args)
                case b"b":
                    state = stack.pop()
                    build(stack[-1], state)
                case b"Q":  # BINPERSID
                    stack[-1] = self.storage(stack[-1])
                case b".":
                    return stack.pop()
                case code:
                    raise ValueError(f"unsupported pickle code {code!r}")
        raise ValueError(f"it has a pickle of more than {LONGEST} bytes or {STEPS} steps")

    def named(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module in BLOCKED:
            raise ValueError(f"unsupported GLOBAL {full}, whose module {module} is blocked")
        if full in CALLS:
            return CALLS[full]
        if full in PLAIN:
            return Kind()
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGES:
            return Kind(STORAGES[name])
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if full not in self.unknown:
            if len(self.unknown) == CLASSES:
                raise ValueError(f"it names more than {CLASSES} classes")
            self.unknown[full] = type(full, (Unread,), {})
        return self.unknown[full]

    def made(self, call: Any, args: Any) -> Any:
        if isinstance(call, type) and issubclass(call, Unread):
            return call()
        if type(args) is not tuple:
            raise ValueError(f"it calls with {type(args).__name__}")
        if any(call is known for known in METHODS.values()):
            return call(self, *args)
        if any(call is known for known in FUNCTIONS.values()):
            return call(*args)
        raise ValueError(f"it calls an object of {type(call).__name__}")

    def of_class(self, rebuild: Any, kind: Any, args: Any, state: Any = None) -> Any:
        """A tensor of a class of its own; of an unknown class nothing can be said."""
        if isinstance(kind, type) and issubclass(kind, Unread):
            return kind()
        if not isinstance(kind, Kind):
            raise ValueError(f"it makes a tensor of {type(kind).__name__}")
        return self.made(rebuild, args)

    def tensor(
        self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...],
        requires_grad: bool = False, hooks: Any = None, metadata: Any = None, *, dtype: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """A view of the storage, compared with it before, since torch would make it longer."""
        if type(storage) is not Storage or any(type(part) not in (tuple, torch.Size) for part in (size, stride)):
            raise ValueError("a tensor has no storage, shape or strides")
        numbers = (offset, *size, *stride)
        if len(size) != len(stride) or any(type(n) is not int or not 0 <= n < 2**63 for n in numbers):
            raise ValueError(f"a tensor has shape {size}, strides {stride} and offset {offset}")
        if metadata:
            raise ValueError("a tensor is conjugated or negated on reading: save it as it is")
        dtype = dtype or storage.dtype
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"a tensor has dtype {dtype!r}")
        elements = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1 if elements else offset
        if last * dtype.itemsize > storage.data.nbytes():
            raise ValueError(
                f"a tensor {[*size]} of {dtype} reaches to byte {last * dtype.itemsize} of a storage of "
                f"{storage.data.nbytes()}"
            )
        self.claims -= elements * dtype.itemsize
        if self.claims < 0:
            raise ValueError("its tensors are views that claim many times the bytes of the file")
        return torch.empty(0, dtype=dtype, device="cpu").set_(storage.data, offset, size, stride)

    def tensor_v3(self, *args: Any) -> Tensor:
        return self.tensor(*args[:6], *args[7:], dtype=args[6])


def encoded(text: Any, codec: Any = "latin-1") -> bytes:
    if type(text) is not str or codec not in LATIN:
        raise ValueError("it holds bytes as pickle does not write them")
    return text.encode(codec)


def key_of(value: Any, depth: int = 3) -> Any:
    """The same, if it is what keys are; tuples in tuples could be hashed for ever, or until the process ends."""
    if type(value) is tuple:
        if not depth or len(value) > 16:
            raise ValueError("it has tuples of tuples as keys")
        for part in value:
            key_of(part, depth - 1)
    return value


def ordered(items: Any = ()) -> OrderedDict:
    pairs = items.items() if isinstance(items, dict) else items
    return OrderedDict((key_of(key), value) for key, value in pairs)


def fill(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise ValueError(f"it sets items of {type(target).__name__}")
    for key, value in zip(items[::2], items[1::2], strict=True):
        target[key_of(key)] = value


def extend(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Unread):
        raise ValueError(f"it appends to {type(target).__name__}")


def build(target: Any, state: Any) -> None:
    if type(target) is OrderedDict:
        # versions of the modules; any other attribute could hide a method
        versions = state.get("_metadata") if isinstance(state, dict) else None
        if isinstance(versions, Mapping):
            vars(target)["_metadata"] = versions
    elif not isinstance(target, (Unread, Counter)):
        raise ValueError(f"it sets the state of {type(target).__name__}")


# what a file may call, under the names that its pickle has; those of builtins are Python 2's
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": ordered,
    "collections.Counter": lambda *args: Counter(ordered(*args)),
    "__builtin__.set": lambda items=(): {key_of(item) for item in items},
    "__builtin__.complex": lambda *args: complex(*args),
    "__builtin__.bytearray": lambda text="", codec="latin-1": bytearray(encoded(text, codec)),
    "_codecs.encode": encoded,
    "torch.Size": lambda sizes=(): torch.Size(sizes),
    "torch.device": lambda *args: torch.device(*args),
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *_: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *_: data,
}
METHODS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": Unpickler.tensor,
    "torch._utils._rebuild_tensor_v2": Unpickler.tensor,
    "torch._utils._rebuild_tensor_v3": Unpickler.tensor_v3,
    "torch._tensor._rebuild_from_type_v2": Unpickler.of_class,
}
CALLS = FUNCTIONS | METHODS
CALLS |= {name.replace("__builtin__", "builtins"): call for name, call in CALLS.items()}
