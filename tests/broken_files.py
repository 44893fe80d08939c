"""Files of weights as nobody's library writes them: claims that the bytes do not bear out."""

import io
import json
import pickle
import struct
import zipfile
from collections import OrderedDict

import numpy as np
import torch


class Stored:
    """A storage by what a pickle says of it."""

    def __init__(self, numel=8, key="0", kind=torch.FloatStorage, before_1_6=False, view=None):
        self.id = ("storage", kind, key, "cpu", numel) + ((view,) if before_1_6 else ())


class View:
    """A tensor by what a pickle says of it."""

    def __init__(self, stored=None, offset=0, size=(2, 4), stride=(4, 1), rebuild=None, more=(False, OrderedDict())):
        self.args = (stored or Stored(), offset, size, stride, *more)
        self.rebuild = rebuild or torch._utils._rebuild_tensor_v2

    def __reduce__(self):
        return self.rebuild, self.args


class Calls:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.id if isinstance(value, Stored) else None


def pickled(content):
    file = io.BytesIO()
    Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def zipped(path, records, compression=zipfile.ZIP_STORED, root="bad/"):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in records.items():
            file.writestr(f"{root}{name}", content)
    return path


def torch_zip(path, content, storages=None, more=None, **how):
    """As torch.save writes, of any content and any storages."""
    storages = {"0": bytes(32)} if storages is None else storages
    data = content if isinstance(content, bytes) else pickled(content)
    records = {"data.pkl": data, "byteorder": b"little", **{f"data/{k}": v for k, v in storages.items()}}
    return zipped(path, records | {"version": b"3\n"} | (more or {}), **how)


# where a field stands in a member's entry of the list at the end, and how
FIELDS = {"flags": (8, "<H"), "method": (10, "<H"), "stored": (20, "<I"), "size": (24, "<I"), "at": (42, "<I")}


def relisted(path, name, **fields):
    """The same archive, which lists one of its members otherwise."""
    content = bytearray(path.read_bytes())
    entry = content.rindex(name.encode()) - 46
    for field, value in fields.items():
        struct.pack_into(FIELDS[field][1], content, entry + FIELDS[field][0], value)
    path.write_bytes(content)
    return path


MAGIC = 0x1950A86A20F9469CFC6C


def torch_before_1_6(path, content, storages=None, keys=None):
    """As torch.save wrote before 1.6; storages: key -> (number of elements, bytes)."""
    storages = {"0": (8, bytes(32))} if storages is None else storages
    parts = [pickled(part) for part in (MAGIC, 1001, {"little_endian": True}, content, keys or [*storages])]
    parts += [struct.pack("<q", count) + data for count, data in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def npy(shape=(2, 4), descr="<f4", data=None, version=(1, 0), order=False):
    """An array as its header says, with the bytes that are given."""
    text = f"{{'descr': {descr!r}, 'fortran_order': {order}, 'shape': {shape!r}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    count = abs(int(np.prod([n for n in shape if type(n) is int and n < 2**20], dtype=object)))
    data = bytes(4 * min(count, 2**16)) if data is None else data
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def npz(path, members, **how):
    return zipped(path, {f"{name}.npy": content for name, content in members.items()}, root="", **how)


def safetensors(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path
