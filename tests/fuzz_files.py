"""Damaged files of weights by chance: what may come of reading them.

`python tests/fuzz_files.py 600 1` goes on for ten minutes, with 1 as the seed of chance.
"""

import io
import json
import random
import resource
import sys
import tempfile
import time
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from vitfast.checkpoints.not_finite import not_finite
from vitfast.checkpoints.reading import read
from vitfast.checkpoints.zipped import most_of

STATE = OrderedDict(
    {
        "a.weight": torch.arange(6.0).view(2, 3),
        "a.bias": torch.ones(2),
        "b": torch.ones(3).bfloat16(),
        "n": torch.tensor(3),
    }
)
INDEX = {"metadata": {"total_size": 32}, "weight_map": dict.fromkeys(STATE, "m.safetensors")}
CONFIG = {
    "architecture": "a", "pretrained_cfg": {"mean": [0.5], "input_size": [3, 8, 8]}, "model_type": "vit",
    "image_size": 8, "num_attention_heads": 2, "layer_norm_eps": 1e-6, "id2label": {"0": "cat"},
    "vision_config": {"hidden_act": "gelu"},
}  # fmt: skip
TRAINING = {"state_dict": STATE, "epoch": 3, "args": {"lr": 1e-3, "names": ("a", "b"), "on": True, "none": None}}
# of what may be taken beside what the process has
MEMORY = 256 << 20


def saved(content, new=True):
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=new)
    return file.getvalue()


def arrays(write=np.savez):
    file = io.BytesIO()
    write(file, **{f"x/{name}": value.float().numpy() for name, value in STATE.items()})
    return file.getvalue()


def unzipped(content):
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def in_zip(content, which):
    """What becomes of the file where one member of it is another: with lengths and sums that are right."""
    members = unzipped(content)

    def wrap(changed):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            for name, own in members.items():
                archive.writestr(name, changed if name == which else own)
        return file.getvalue()

    return members[which], wrap


def header_of_safetensors(content):
    length = int.from_bytes(content[:8], "little")
    data = content[8 + length :]
    return content[8 : 8 + length], lambda changed: len(changed).to_bytes(8, "little") + changed + data


def as_is(content):
    return content, bytes


NEW, OLD, ARRAYS = saved(TRAINING), saved(TRAINING, new=False), arrays()
# what is changed, and what makes a file of it, by the name of that file
TARGETS = {
    "whole/m.safetensors": as_is(save(STATE)),
    "header/m.safetensors": header_of_safetensors(save(STATE)),
    "whole/m.npz": as_is(ARRAYS),
    "deflated/m.npz": as_is(arrays(np.savez_compressed)),
    "member/m.npz": in_zip(ARRAYS, "x/a.weight.npy"),
    "whole/m.pth": as_is(NEW),
    "pickle/m.pth": in_zip(NEW, next(name for name in unzipped(NEW) if name.endswith("data.pkl"))),
    "before 1.6/m.pth": as_is(OLD),
    "index/model.safetensors.index.json": as_is(json.dumps(INDEX).encode()),
    "config/config.json": as_is(json.dumps(CONFIG).encode()),
}
# that come in formats, or are at the end of what a number can be
PIECES = [
    b"0", b"-1", b"9" * 20, b"1e99", b"null", b"[", b"]", b"{", b"}", b'"', b",", b"../", b"/", b"\\", b"\0",
    b"\xff" * 4, b"\xff" * 8, b"\0\0\0\x80", b"\xff\xff\xff\x7f", b"R", b"b", b".", b"(", b"t", b"\x85", b"\x81", b"Q",
    b"cos\nsystem\n", b"ctorch\nTensor\n", b"c__builtin__\nset\n", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"'O'", b"'<V2'",
    b"True", b"__metadata__",
]  # fmt: skip


def mutated(data, number):
    """The bytes with a few changes; number: a function that gives a number below its argument."""
    data = bytearray(data)
    for _ in range(1 + number(4)):
        at, length = number(len(data) + 1), 1 + number(16)
        kind = number(7)
        if kind == 0:
            data[at : at + 1] = bytes([number(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << number(8)
        elif kind == 2:
            del data[at : at + length]
        elif kind == 3:
            data[at:at] = data[at : at + length] * (1 + number(3))
        elif kind == 4:
            piece = PIECES[number(len(PIECES))]
            data[at : at + len(piece) * number(2)] = piece
        elif kind == 5:
            other = number(len(data) + 1)
            data[at:at] = data[other : other + length]
        elif number(4) == 0:
            del data[at:]
    return bytes(data)


def limited():
    """A limit of memory for this process, so that what a file claims cannot be had."""
    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) << 10
    limits = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (used + MEMORY, limits[1]))
    return limits


def outcome(target, content, folder):
    """Reads a file of this content, and looks at each tensor; 'read' or the kind of error.

    Raises:
        Exception: an error that reading may not end in.
    """
    path = Path(folder) / target.partition("/")[2]
    path.write_bytes(content)
    beside = Path(folder) / "m.safetensors"
    if path.suffix == ".json":
        beside.write_bytes(save(STATE))
    try:
        got = read(beside if path.name == "config.json" else path, allow_pickle=True)
        _ = got.facts
    except (ValueError, FileNotFoundError) as error:
        if isinstance(error.__cause__, MemoryError) or "memory" in str(error):
            raise AssertionError(f"memory was asked for: {error}") from error
        if path.name not in str(error):
            raise AssertionError(f"the file is not named: {error}") from error
        return type(error.__cause__ or error).__name__
    finally:
        path.unlink()
        beside.unlink(missing_ok=True)
    tensors = {name: value for name, value in got.state.items() if isinstance(value, torch.Tensor)}
    not_finite(tensors)
    for value in tensors.values():
        value.clone()
    if sum(value.nbytes for value in tensors.values()) > most_of(len(content)) and path.suffix != ".json":
        raise AssertionError("more bytes than the file can hold")
    return "read"


def main(seconds, seed):
    counts, chance, names = Counter(), random.Random(seed), [*TARGETS]
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as folder:

        def once(number):
            name = names[number(len(names))]
            data, wrap = TARGETS[name]
            changed = wrap(mutated(data, number))
            try:
                counts[name, outcome(name, changed, folder)] += 1
            except Exception as error:
                path = Path(tempfile.gettempdir()) / f"fuzzed-{name.replace('/', '-')}-{counts.total()}"
                path.write_bytes(changed)
                print(f"{path}: {type(error).__name__}: {error}", flush=True)
                counts[name, f"WRONG {type(error).__name__}"] += 1

        limited()
        while time.monotonic() < end:
            once(lambda below: chance.randrange(below) if below else 0)
    for (name, what), count in sorted(counts.items()):
        print(f"{name:40} {what:24} {count}")
    print(f"{counts.total()} files")
    return any(what.startswith("WRONG") for _, what in counts)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), int((sys.argv + ["0"])[2])))
