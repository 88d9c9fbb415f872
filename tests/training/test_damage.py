"""Damaged and inflated files: read as they were written, or refused; never with other numbers."""

import contextlib
import hashlib
import io
import json
import pickle
import random
import re
import warnings
import zipfile

import pytest
import torch
from safetensors import safe_open
from torch import nn

import lit_diffusion as ld
from lit_diffusion import PowerProfile, RunningAverage
from lit_diffusion.training import LitDiffusion, WholeCheckpointIO
from lit_diffusion.training.run.archive import check_archive
from lit_diffusion.training.run.checkpoints import load_checkpoint
from lit_diffusion.training.run.snapshots import mix, read_snapshots, write_snapshot
from lit_diffusion.training.run.tensor_file import open_tensors, write_tensors


def same(one, other):
    """Whether two structures of tensors have the same numbers, bit for bit."""
    if torch.is_tensor(one):
        alike = torch.is_tensor(other) and (one.dtype, one.shape) == (other.dtype, other.shape)
        return alike and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def flips(whole, number):
    """Copies of some bytes, each with one other bit flipped."""
    chosen = random.Random(0)
    for _ in range(number):
        damaged = bytearray(whole)
        damaged[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        yield bytes(damaged)


@pytest.fixture(scope="module")
def saved():
    """A small checkpoint of everything that torch stores, and its bytes."""
    net = nn.Linear(20, 20)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.randn(3, 20)).sum().backward()
    optimizer.step()
    contents = {
        "state_dict": net.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "hyper_parameters": {"schedule": None, "weighting": None, "prediction": None},
        "random": torch.get_rng_state(),
        "types": [
            torch.arange(5).to(kind)
            for kind in (torch.bfloat16, torch.uint16, torch.complex64, torch.bool, torch.int8)
        ],
        "views": [torch.ones(2, 6)[:, 1:3], torch.ones(1).expand(5), torch.zeros(0)],
        "others": [{1, 2}, b"bytes", bytearray(b"more"), torch.Size([1]), torch.float16],
    }
    file = io.BytesIO()
    torch.save(contents, file)
    return contents, file.getvalue()


@pytest.mark.parametrize("read", [load_checkpoint, WholeCheckpointIO().load_checkpoint])
def test_a_flipped_bit_of_a_checkpoint_changes_no_number(tmp_path, saved, read):
    contents, whole = saved
    path, refused, changed = tmp_path / "last.ckpt", 0, 0
    for damaged in flips(whole, 200):
        path.write_bytes(damaged)
        try:
            found = read(path)
        except ValueError:
            refused += 1
        else:
            assert same(found, contents)
        with warnings.catch_warnings(action="ignore"), contextlib.suppress(Exception):
            changed += not same(torch.load(path, weights_only=True), contents)  # torch alone
    assert refused > 100
    assert changed > 50


def test_a_damaged_checkpoint_is_named(tmp_path, saved):
    whole = saved[1]
    path = tmp_path / "last.ckpt"
    number = whole.index(saved[0]["state_dict"]["weight"].numpy().tobytes())
    path.write_bytes(whole[:number] + bytes([whole[number] ^ 1]) + whole[number + 1 :])
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged, or not .*: Bad CRC-32") as found:
        LitDiffusion.load_from_checkpoint(path)
    assert str(found.value).endswith("Use another checkpoint of the run, or copy the file again.")
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is damaged, or not a checkpoint: File is not a zip"):
        load_checkpoint(path)


def test_a_remote_checkpoint_is_checked_as_well(saved):
    import fsspec

    for damaged in (False, True):
        whole = bytearray(saved[1])
        whole[whole.index(saved[0]["random"].numpy().tobytes())] ^= damaged
        with fsspec.open("memory://run/last.ckpt", "wb") as file:
            file.write(whole)
        if damaged:
            with pytest.raises(ValueError, match=r"memory://run/last\.ckpt is damaged"):
                WholeCheckpointIO().load_checkpoint("memory://run/last.ckpt")
        else:
            assert same(WholeCheckpointIO().load_checkpoint("memory://run/last.ckpt"), saved[0])


# What would need more memory than the file has bytes --------------------------------------------


def archived(entries, kind=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as archive:
        for name, contents in entries.items():
            archive.writestr(f"a/{name}", contents)
    return file


def rewritten(whole, change):
    """The checkpoint of these bytes, with its structure changed and right checksums."""
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        entries = {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}
    entries["data.pkl"] = change(entries["data.pkl"])
    return archived(entries)


def saved_bytes(contents):
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


class Bytes:
    """Unpickled as that many zero bytes."""

    def __reduce__(self):
        return bytearray, (10**10,)


def overlapping():
    """Two entries in the directory at the same place of the file."""
    file = archived({"data.pkl": b"x" * 1000})
    whole = file.getvalue()
    begin = whole.index(b"PK\x01\x02")
    end = whole.index(b"PK\x05\x06")
    entry, rest = whole[begin:end], bytearray(whole[end:])
    second = entry.replace(b"a/data.pkl", b"a/data.pkx")
    rest[8:12] = (2).to_bytes(2, "little") * 2
    rest[12:16] = (2 * len(entry)).to_bytes(4, "little")
    return io.BytesIO(whole[:begin] + entry + second + bytes(rest))


#: 100 numbers that are said to be 120; the number is the byte after the place, cpu.
LONGER = rewritten(
    saved_bytes(torch.zeros(100)), lambda s: re.sub(rb"(cpuq.K)d", rb"\1x", s, count=1)
)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        (archived({"data.pkl": bytes(10**6)}, zipfile.ZIP_DEFLATED), "got compressed ones"),
        (overlapping(), "got entries larger than it"),
        (LONGER, "numbers of 480 bytes are stored in 400 bytes"),
        (io.BytesIO(saved_bytes(torch.ones(1).expand(10**9))), "1000000000 numbers are made of"),
        (io.BytesIO(saved_bytes(Bytes())), "10000000000 numbers are made of"),
        (archived({"data.pkl": b"Nr" + (10**9).to_bytes(4, "little") + b"."}), "more objects"),
        (archived({"data.pkl": pickle.dumps(1)[:-1]}), ""),
        (archived({}), ""),
    ],
    ids=["compressed", "overlapping", "longer", "view", "bytearray", "index", "cut", "empty"],
)
def test_an_inflated_checkpoint_is_refused_before_it_is_loaded(
    tmp_path, file, reason, monkeypatch
):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was loaded"))
    path = tmp_path / "last.ckpt"
    path.write_bytes(file.getvalue())
    with pytest.raises(ValueError, match="is damaged, or not a checkpoint") as found:
        load_checkpoint(path)
    assert reason in str(found.value)


def test_the_check_leaves_the_file_at_its_beginning(saved):
    file = io.BytesIO(saved[1])
    file.seek(7)
    check_archive(file)
    assert file.tell() == 0


# Files of tensors -------------------------------------------------------------------------------


def test_a_flipped_bit_of_a_file_of_tensors_changes_no_number(tmp_path):
    path = tmp_path / "some.safetensors"
    tensors = {"a": torch.randn(5, 7).half(), "b": torch.randn(30), "c": torch.zeros(0)}
    about = {"step": 3, "text": "ε"}
    write_tensors(path, tensors, about)
    whole, refused = path.read_bytes(), 0
    for damaged in flips(whole, 200):
        path.write_bytes(damaged)
        try:
            with open_tensors(path) as file:
                found = {name: file.read(name) for name in file.names}, file.about
        except ValueError:
            refused += 1
        else:
            assert same(found, (tensors, about))
    assert refused > 100


def test_a_damaged_snapshot_is_named_when_it_is_used(tmp_path):
    average = RunningAverage(PowerProfile(0.1), [torch.randn(100)])
    average.update([torch.randn(100)])
    path = write_snapshot(tmp_path, 1, ["weight"], [average])
    (stored,) = read_snapshots(tmp_path)
    with safe_open(path, "pt") as file:
        numbers = file.get_tensor("0.1/weight").numpy().tobytes()
    whole = bytearray(path.read_bytes())
    whole[whole.index(numbers)] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"step-0000001.safetensors is damaged"):
        mix([stored], [1.0])


def test_weights_that_do_not_have_the_checksum_of_the_config_are_refused(tmp_path):
    from safetensors.torch import save_file

    from lit_diffusion.description import describe

    network = ld.ResidualMLP(shape=(1, 1, 2), features=8, layers=1)
    model = ld.Pretrained(network, shape=(1, 1, 2))
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    config = {"model": describe(model), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ld.load_pretrained(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[-1] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged, or belongs to another"):
        ld.load_pretrained(tmp_path)
