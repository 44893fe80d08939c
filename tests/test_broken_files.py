"""Broken and hostile files of weights: what allocates by a claim, hangs, ends the process, or loads half."""

import json
import os
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch
from broken_files import Calls, Stored, View, npy, npz, relisted, safetensors, torch_before_1_6, torch_zip, zipped
from safetensors.torch import save_file

import vitfast
from vitfast.checkpoints import unpickler
from vitfast.checkpoints.reading import read

TERA = 10**12


def refused(path, why, **how):
    """One ValueError that names the file and the reason."""
    with pytest.raises(ValueError, match=f"(?s){path.name}.*{why}"):
        read(path, allow_pickle=True, **how)


def view(**fields):
    return {"w": View(**fields)}


CLAIMS = {
    "storage of terabytes": (view(stored=Stored(TERA), size=(TERA,), stride=(1,)), "storage '0' claims 4000000000000"),
    "storage of a negative size": (view(stored=Stored(-8)), "names a storage as torch.save does not"),
    "storage of half an element": (view(stored=Stored(7.5)), "names a storage as torch.save does not"),
    "storage that is not there": (view(stored=Stored(key="7")), "there is no storage '7'"),
    "storage elsewhere": (view(stored=Stored(key="../version", numel=0)), r"there is no storage '\.\./version'"),
    "shape larger than its storage": (view(size=(TERA,), stride=(1,)), "reaches to byte 4000000000000 of a storage"),
    "shape whose product overflows": (view(size=(2**62, 8)), "reaches to byte"),
    "strides that read outside": (view(stride=(10**9, 1)), "reaches to byte"),
    "offset outside": (view(offset=1), "reaches to byte 36 of a storage of 32"),
    "negative offset": (view(offset=-1), "offset -1"),
    "negative stride": (view(stride=(-4, 1)), "strides"),
    "negative dim": (view(size=(-2, -4)), "shape"),
    "dims and strides that do not agree": (view(stride=(1,)), "strides"),
    "dim that is no number": (view(size=("2", 4)), "shape"),
    "view of itself a million times": (view(size=(2**20, 2**20), stride=(0, 0)), "claim many times the bytes"),
    "views of all there is": (
        {f"w{i}": View(Stored(1000), size=(1000,), stride=(1,)) for i in range(2000)},
        "claim many times the bytes",
    ),
    "conjugated": (view(more=(False, OrderedDict(), {"conj": True})), "conjugated"),
    "longer dtype than its storage": (
        view(rebuild=torch._utils._rebuild_tensor_v3, more=(False, OrderedDict(), torch.float64)),
        "reaches to byte 64",
    ),
    "empty tensor made by a call": ({"w": Calls(torch.Tensor, TERA)}, "calls an object of Kind"),
    "storage made by a call": ({"w": Calls(torch.UntypedStorage, TERA)}, "calls an object of Kind"),
    "storage made by a tensor of a class": (
        {"w": Calls(torch._tensor._rebuild_from_type_v2, torch.UntypedStorage, torch.Tensor, (TERA,), {})},
        "calls an object of Kind",
    ),
    "tensor of no class": (
        {"w": Calls(torch._tensor._rebuild_from_type_v2, torch.Size, torch.float32, ((1,),), {})},
        "a tensor of dtype",
    ),
    "view of no storage": (view(stored="text"), "no storage, shape or strides"),
    "bytes made by a call": ({"w": Calls(bytearray, TERA)}, "bytes as pickle does not write them"),
}


@pytest.mark.parametrize("case", CLAIMS)
def test_pickle_gets_what_it_claims(case, tmp_path):
    content, why = CLAIMS[case]
    storages = {"0": bytes(4000)} if case == "views of all there is" else None
    refused(torch_zip(tmp_path / "bad.pth", content, storages), why)
    refused(torch_zip(tmp_path / "bad.pth", {"state_dict": content, "epoch": 3}, storages), why, mapped=False)


old = dict(before_1_6=True)
BEFORE_1_6 = {
    "storage of terabytes": (view(stored=Stored(TERA, **old)), None, None, "claims 4000000000000 bytes in a file"),
    "storages that are terabytes together": (
        {f"w{i}": View(Stored(1000, key=str(i), **old)) for i in range(10**4)}, None, None, "claims 4000 bytes in",
    ),
    "another size where it stands": (view(stored=Stored(**old)), {"0": (9, bytes(36))}, None, "another size"),
    "end before its bytes": (view(stored=Stored(**old)), {"0": (8, bytes(31))}, None, "EOFError"),
    "storage that is never filled": (view(stored=Stored(**old)), {}, ["1"], "other storages than it lists"),
    "storage that is filled twice": (view(stored=Stored(**old)), None, ["0", "0"], "other storages than it lists"),
    "storages without an order": (view(stored=Stored(**old)), None, ["0", 0], "not a whole file"),
    "view outside its storage": (
        view(stored=Stored(view=("1", 4, TERA), **old)), None, None, "reaches to byte 32 of a storage of 16",
    ),
    "view before its storage": (view(stored=Stored(view=("1", -4, 8), **old)), None, None, "begins at -4"),
}  # fmt: skip


@pytest.mark.parametrize("case", BEFORE_1_6)
def test_pickle_before_1_6_gets_what_it_claims(case, tmp_path):
    """Such files say first what storages they have, and last what is in them."""
    content, storages, keys, why = BEFORE_1_6[case]
    refused(torch_before_1_6(tmp_path / "bad.pth", content, storages, keys), why)


def nest(depth, last=b"N"):
    return b"\x80\x02" + last + b"\x85" * depth


def doubled(times):
    """A tuple of two of a tuple of two of ..."""
    return b"\x80\x02}N" + b"".join(b"q%c" % (i % 256) + b"h%c" % (i % 256) + b"\x86" for i in range(times))


PICKLES = {
    "key of tuples in tuples": (b"\x80\x02}" + nest(10**6)[2:] + b"Ns.", "tuples of tuples as keys"),
    "key that takes ages to hash": (doubled(200) + b"Ns.", "tuples of tuples as keys"),
    "set of what takes ages to hash": (
        b"\x80\x02c__builtin__\nset\n]" + doubled(200)[3:] + b"a\x85R.", "tuples of tuples as keys",
    ),
    "text that doubles": (b"\x80\x02c_codecs\nencode\nX\1\0\0\0aX\3\0\0\0hex\x86R.", "bytes as pickle does not write"),
    "a million classes": (b"\x80\x02" + b"".join(b"ca\nb%d\n" % i for i in range(20_000)) + b".", "10000 classes"),
    "text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "EOFError"),
    "no end": (b"\x80\x02}", "EOFError"),
    "empty stack": (b"\x80\x02s.", "IndexError"),
    "memo that is not there": (b"\x80\x02h\x05.", "KeyError"),
    "code that torch does not write": (b"\x80\x04\x95", "unsupported pickle code"),
    "attribute that hides a method": (
        b"\x80\x02ccollections\nOrderedDict\n)R}X\5\0\0\0itemsNsb.", "flat mapping of names to tensors|no weights|",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PICKLES)
def test_pickle_hangs_or_ends_the_process(case, tmp_path):
    content, why = PICKLES[case]
    path = torch_zip(tmp_path / "bad.pth", content)
    if why.endswith("|"):
        assert read(path, allow_pickle=True).state == {}
    else:
        refused(path, why)


def test_pickle_of_small_objects_has_no_end(tmp_path, monkeypatch):
    """An empty dict is one byte there and 64 here."""
    monkeypatch.setattr(unpickler, "STEPS", 1000)
    refused(torch_zip(tmp_path / "bad.pth", b"\x80\x02" + b"}" * 1000 + b"."), "or 1000 steps")
    assert read(torch_zip(tmp_path / "m.pth", view()), allow_pickle=True).state


def test_mapping_in_a_thousand_places_of_itself_is_looked_into_for_ages(tmp_path):
    once = {}
    content = {}
    for depth in range(4):
        content = {f"{depth}.{i}": once if depth == 0 else content for i in range(1000)}
    torch.save({"state_dict": content}, tmp_path / "bad.pth")
    refused(tmp_path / "bad.pth", "flat mapping")


def test_error_names_a_million_things(tmp_path):
    torch.save({f"w{i}": i for i in range(10**4)}, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match="w7': int and 9992 more") as error:
        read(tmp_path / "bad.pth", allow_pickle=True)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_bomb_goes_off(compression, tmp_path):
    """Of zeros a thousand times less is left; nothing is unpacked to find out."""
    zeros = bytes(1 << 26)
    refused(torch_zip(tmp_path / "a.pth", view(), {"0": zeros}, compression=compression), "bytes|compressed")
    member = {"w": npy((1 << 24,), data=zeros)}
    refused(npz(tmp_path / "a.npz", member, compression=compression), "cannot be|method")


def test_compressed_storage_is_taken_for_weights(tmp_path):
    path = torch_zip(tmp_path / "bad.pth", view(), {"0": os.urandom(32)}, compression=zipfile.ZIP_DEFLATED)
    refused(path, "is compressed, which torch.save never does")


def overlapping(path, count):
    """Many members, all with the same bytes: each fits, together they do not."""
    one = npy((1 << 18,), data=bytes(1 << 20))
    local = struct.pack("<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 0, 0, 0, zipfile.crc32(one), len(one), len(one), 5, 0)
    entries = b""
    for i in range(count):
        name = b"%05d.npy" % i
        fields = (20, 20, 0, 0, 0, 0, zipfile.crc32(one), len(one), len(one), len(name), 0, 0, 0, 0, 0, 0)
        entries += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\1\2", *fields) + name
    body = local + b"0.npy" + one
    end = struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, count, count, len(entries), len(body), 0)
    path.write_bytes(body + entries + end)
    return path


def test_members_that_share_their_bytes_are_all_read(tmp_path):
    refused(overlapping(tmp_path / "a.npz", 200), "claim 2.* bytes, which weights in a file of 1")
    refused(overlapping(tmp_path / "b.npz", 2), "npz")
    refused(overlapping(tmp_path / "c.npz", 60_000), "its list names 60000 members, more than 50000")


LISTED = {
    "encrypted": (dict(flags=1), "is encrypted"),
    "compressed by something": (dict(method=12), "compressed by method 12"),
    "larger than what is stored": (dict(size=40), "is stored in 32 bytes and claims 40"),
    "smaller than what is stored": (dict(size=16), "is stored in 32 bytes and claims 16"),
    "after the end": (dict(at=10**6), "ends after the file"),
    "where another member begins": (dict(at=1), "does not begin where the list says"),
    "until after the end": (dict(stored=400, size=400), "ends after the file"),
}


@pytest.mark.parametrize("case", LISTED)
def test_list_of_members_is_believed(case, tmp_path):
    fields, why = LISTED[case]
    refused(relisted(torch_zip(tmp_path / "bad.pth", view()), "bad/data/0", **fields), why)


def test_pickle_of_gigabytes_is_read(tmp_path):
    path = tmp_path / "bad.pth"
    with zipfile.ZipFile(path, "w") as file, file.open("bad/data.pkl", "w", force_zip64=True) as member:
        for _ in range(101):
            member.write(b"N" * 10**6)
    refused(path, "a pickle of more than 100000000 bytes$")


ARRAYS = {
    "shape larger than its bytes": (npy((500, 32), data=bytes(640)), r"\[500, 32\] of float32 needs 64\d+ bytes"),
    "shape of terabytes": (npy((TERA,)), "needs 4000000000"),
    "shape whose product overflows": (npy((2**62, 8)), "needs"),
    "smaller shape than its bytes": (npy((2, 2), data=bytes(640)), "needs 1"),
    "negative dim": (npy((-2, -4)), r"has shape \(-2, -4\)"),
    "dim that is no number": (npy(("a",)), "not a whole npz"),
    "objects": (npy(descr="|O"), "objects, which only pickle reads"),
    "text": (npy(descr="<U1"), "no dtype of weights"),
    "fields": (npy(descr=[("a", "<f4")]), "no dtype of weights"),
    "dates": (npy(descr="<M8[s]", data=bytes(64)), "no dtype of weights"),
    "eight bits without a name": (npy(descr="|V1", data=bytes(8)), "no dtype of weights"),
    "longdouble": (npy(descr="<f16", data=bytes(128)), "no dtype of weights"),
    "unknown dtype": (npy(descr="<f31"), "not a whole npz"),
    "code as a header": (npy(descr="__import__('os')"), "not a whole npz"),
    "header of another version": (npy(version=(9, 0)), "version"),
    "header that goes on": (b"\x93NUMPY\1\0\xff\xff{", "not a whole npz"),
    "header of brackets": (b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000, "not a whole npz"),
    "no header": (b"", "not a whole npz"),
    "text file": (b"weights", "not a whole npz"),
}


@pytest.mark.parametrize("case", ARRAYS)
def test_array_gets_what_it_claims(case, tmp_path):
    """After a good one: nothing half loaded."""
    content, why = ARRAYS[case]
    refused(npz(tmp_path / "bad.npz", {"good": npy(), "w": content}), why)
    refused(npz(tmp_path / "bad.npz", {"good": npy(), "w": content}, compression=zipfile.ZIP_DEFLATED), why)


def test_array_whose_stream_ends_early_has_what_was_in_memory(tmp_path):
    """Its list claims what its header does; the sum is of what there is."""
    content = npy((16,), data=bytes(32))
    path = npz(tmp_path / "bad.npz", {"w": content}, compression=zipfile.ZIP_DEFLATED)
    refused(relisted(path, "w.npy", size=len(content) + 32), "ends before its 64 bytes")


MEMBERS = ["/etc/passwd.npy", "../../w.npy", "a/../../w.npy", "a\\..\\w.npy"]


@pytest.mark.parametrize("name", MEMBERS)
def test_member_with_a_path_is_taken(name, tmp_path):
    refused(zipped(tmp_path / "bad.npz", {name: npy()}, root=""), "path out of the archive")


def test_link_is_taken_for_an_array(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        info = zipfile.ZipInfo("w.npy")
        info.external_attr = 0o120777 << 16
        file.writestr(info, "/etc/passwd")
    refused(tmp_path / "bad.npz", "symbolic link")


def test_second_of_two_members_of_a_name_wins(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "bad.npz", "w") as file:
        file.writestr("w.npy", npy())
        file.writestr("w.npy", npy())
    refused(tmp_path / "bad.npz", "two members are called 'w.npy'")


def test_changed_byte_of_an_array_is_not_seen(tmp_path):
    path = npz(tmp_path / "bad.npz", {"w": npy((1000,))})
    content = bytearray(path.read_bytes())
    content[2000] ^= 1
    path.write_bytes(content)
    refused(path, "CRC")


WHOLE = {
    "m.safetensors": lambda path, state: save_file(state, path),
    "m.npz": lambda path, state: np.savez(path, **{name: value.numpy() for name, value in state.items()}),
    "z.npz": lambda path, state: np.savez_compressed(path, **{name: value.numpy() for name, value in state.items()}),
    "m.pth": lambda path, state: torch.save(state, path),
    "old.pth": lambda path, state: torch.save(state, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("name", WHOLE)
def test_file_that_ends_early_is_loaded_in_part(name, tmp_path):
    """Wherever it ends."""
    path = tmp_path / name
    WHOLE[name](path, {"a": torch.randn(3, 5), "b": torch.randn(7)})
    whole = path.read_bytes()
    for end in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 1]:
        path.write_bytes(whole[:end])
        refused(path, "is empty" if end == 0 else "")


SAFETENSORS = {
    "key twice": b"{%b,%b}" % ((b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}',) * 2),
    "brackets in brackets": b'{"a":' + b"[" * 10**5,
    "metadata that is no text": b'{"__metadata__":{"a":{"b":[1]}}}',
    "terabytes": b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
    "no text": b"\xff" * 100,
    "bytes backwards": b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}',
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_header_of_safetensors_is_believed(case, tmp_path):
    header = SAFETENSORS[case]
    try:
        state = read(safetensors(tmp_path / "bad.safetensors", header, bytes(8))).state
    except ValueError as error:
        assert "bad.safetensors" in str(error)
    else:
        assert case == "key twice" and state["a"].numel() == 2


INDICES = {
    "out of the folder": ({"a": "../m.safetensors"}, "outside its folder"),
    "absolute": ({"a": "/etc/passwd"}, "outside its folder"),
    "backslashes": ({"a": "..\\m.safetensors"}, "outside its folder"),
    "null": ({"a": "m\0.safetensors"}, "outside its folder"),
    "the folder": ({"a": "."}, "outside its folder"),
    "itself": ({"a": "model.safetensors.index.json"}, "an index, in place of a shard"),
    "a number": ({"a": 3}, "a shard is 3"),
    "a list": ({"a": ["m.safetensors"]}, "a shard is"),
    "nothing": ({}, "is empty"),
    "a list of names": (["m.safetensors"], "no index of shards"),
}


@pytest.mark.parametrize("case", INDICES)
def test_index_names_what_is_no_shard(case, tmp_path):
    names, why = INDICES[case]
    save_file({"a": torch.ones(1)}, tmp_path / "m.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    refused(index, why)


TEXTS = {
    "": "is empty", "{": "no index", "[]": "no index", "null": "no index", "[" * 10**5: "no index",
    '{"weight_map": {"a": "m.safetensors", "a": "n.safetensors"}}': "twice", "\ud800": "no index",
    '{"weight_map": ' + "9" * 10**5 + "}": "no index",
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:20])
def test_index_that_is_no_json_is_a_traceback(text, tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_bytes(text.encode(errors="surrogatepass"))
    refused(index, TEXTS[text])


def test_index_of_gigabytes_is_parsed(tmp_path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(1 << 34)
    refused(tmp_path / "model.safetensors.index.json", "more than")


def test_shard_is_a_link_out_of_the_folder(tmp_path):
    """But for the cache of the hub, where all files of a snapshot are links."""
    save_file({"a": torch.ones(1)}, tmp_path / "elsewhere")
    folder = tmp_path / "repo" / "snapshots" / "1"
    folder.mkdir(parents=True)
    (folder / "m.safetensors").symlink_to(tmp_path / "elsewhere")
    index = folder / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "m.safetensors"}}')
    refused(index, "a link to a file outside its folder")
    blobs = tmp_path / "repo" / "blobs"
    blobs.mkdir()
    os.replace(tmp_path / "elsewhere", blobs / "0")
    (folder / "m.safetensors").unlink()
    (folder / "m.safetensors").symlink_to("../../blobs/0")
    assert torch.equal(read(index).state["a"], torch.ones(1))


def test_torchscript_is_called_damaged(tmp_path):
    refused(torch_zip(tmp_path / "m.pth", view(), more={"constants.pkl": b"N."}), "TorchScript archive")


def test_zip_of_something_else_is_read(tmp_path):
    refused(zipped(tmp_path / "m.pth", {"weights.txt": b"1"}, root=""), "a zip archive, but none of torch.save")
    refused(zipped(tmp_path / "m.zip", {"a/data.pkl": b"N.", "b/data.pkl": b"N."}, root=""), "none of torch.save")


def test_model_is_half_loaded(tmp_path):
    """The second of two shards is broken."""
    small = dict(image_size=32, patch_size=8, num_classes=5, dim=32, depth=1, heads=2)
    model = vitfast.ViT.from_config(vitfast.ViTConfig(**small))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [*before]
    save_file({name: torch.ones_like(before[name]) for name in names[:8]}, tmp_path / "a.safetensors")
    save_file({name: torch.ones_like(before[name]) for name in names[8:]}, tmp_path / "b.safetensors")
    whole = (tmp_path / "b.safetensors").read_bytes()
    (tmp_path / "b.safetensors").write_bytes(whole[:-1])
    index = {name: "a.safetensors" if name in names[:8] else "b.safetensors" for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    with pytest.raises(ValueError, match="b.safetensors"):
        vitfast.load_checkpoint(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


LIMITED = """
import resource, sys
from vitfast.checkpoints.reading import read
used = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (used + (64 << 20),) * 2)
for path in sys.argv[1:]:
    try:
        read(path, allow_pickle=True)
    except ValueError as error:
        print(type(error.__cause__).__name__)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc are Linux's")
def test_claim_is_allocated_before_it_is_refused(tmp_path):
    """In a process that may take 64 MB: what asked for more ends in MemoryError or torch's RuntimeError."""
    paths = [torch_zip(tmp_path / f"{i}.pth", content) for i, (content, _) in enumerate(CLAIMS.values())]
    paths += [torch_before_1_6(tmp_path / f"{i}.bin", *case[:3]) for i, case in enumerate(BEFORE_1_6.values())]
    paths += [npz(tmp_path / f"{i}.npz", {"w": content}) for i, (content, _) in enumerate(ARRAYS.values())]
    done = subprocess.run([sys.executable, "-c", LIMITED, *paths], capture_output=True, text=True, check=True)
    kinds = done.stdout.split()
    assert len(kinds) == len(paths)
    assert not {*kinds} & {"MemoryError", "RuntimeError", "OSError"}, kinds
