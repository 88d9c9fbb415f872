"""Data that changed between a checkpoint and its resumption, and names that are patterns, too."""

import json
import os
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from image_files import PARDONS, encode, labels, module, pixels, same, stored, take, write_parquet
from PIL import Image

from lit_diffusion.training.data.reading import content
from lit_diffusion.training.data.reading.content import differ, digests

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]

N = 60
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def write(folder, images, numbers, names=("a", "b")):
    """Two uncompressed files, whose size depends on the number of rows alone."""
    folder.mkdir(exist_ok=True)
    half = len(images) // 2
    for name, part in zip(names, (slice(half), slice(half, None)), strict=True):
        rows = [{"bytes": stored(Image.fromarray(one[0]), "BMP")} for one in images[part]]
        table = pa.table({"image": pa.array(rows, STRUCT), "label": pa.array(numbers[part])})
        file = folder / f"train-{name}.parquet"
        parquet.write_table(
            table, file, 10, compression="none", use_dictionary=False, write_statistics=False
        )
        os.utime(file, (1e9, 1e9))


def arrays():
    return pixels(N), np.arange(N)


def one_label(images, numbers):
    numbers[31] = 7


def one_pixel(images, numbers):
    images[40, 0, 3, 3] ^= 1


def two_rows(images, numbers):
    images[[20, 50]], numbers[[20, 50]] = images[[50, 20]], numbers[[50, 20]]


def two_labels(images, numbers):
    numbers[[20, 21]] = numbers[[21, 20]]


def all_but_the_first(images, numbers):
    images[1:] = pixels(N, seed=3)[1:]


def the_last(images, numbers):
    images[-1] = 0


EDITS = [one_label, one_pixel, two_rows, two_labels, all_but_the_first, the_last]


def state_of(folder, **settings):
    loader = module(folder, val_split=None, **settings).train_dataloader()
    take(loader, 10)
    return json.loads(json.dumps(loader.state_dict()))


def resume(state, folder, **settings):
    loader = module(folder, val_split=None, **settings).train_dataloader()
    loader.load_state_dict(state)
    return loader


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
def test_an_edit_that_keeps_size_and_time_is_noticed(tmp_path, edit, streaming):
    images, numbers = arrays()
    write(tmp_path / "set", images, numbers)
    sizes = [file.stat().st_size for file in sorted((tmp_path / "set").iterdir())]
    state = state_of(tmp_path / "set", streaming=streaming)
    resume(state, tmp_path / "set", streaming=streaming)
    edit(images, numbers)
    write(tmp_path / "set", images, numbers)
    assert [file.stat().st_size for file in sorted((tmp_path / "set").iterdir())] == sizes
    with pytest.raises(ValueError, match="cannot resume the data: the content of") as caught:
        resume(state, tmp_path / "set", streaming=streaming)
    assert "data.on_changed_data" in str(caught.value)
    assert "\n" not in str(caught.value)
    settings = {"streaming": streaming, "on_changed_data": "continue"}
    loader = resume(state, tmp_path / "set", **settings)
    assert {position.epoch for position in loader.positions} == {2}
    for batch in take(loader, 8):  # with the data as they are now, from no cache
        for place, index in enumerate(batch["index"].tolist()):
            assert torch.equal(batch["image"][place], torch.from_numpy(images[index]))
            assert batch["label"][place] == numbers[index]


@pytest.mark.parametrize("streaming", [True, False])
def test_data_that_moved_or_were_touched_are_the_same(tmp_path, streaming):
    write(tmp_path / "set", *arrays())
    settings = {"streaming": streaming, "num_workers": 2}
    loader = module(tmp_path / "set", val_split=None, **settings).train_dataloader()
    take(loader, 5)
    state = loader.state_dict()
    expected = take(loader, 12)
    shutil.move(tmp_path / "set", tmp_path / "moved")
    for file in (tmp_path / "moved").iterdir():
        os.utime(file)
    assert same(take(resume(state, tmp_path / "moved", **settings), 12), expected)


def test_more_rows_are_told_by_their_number(tmp_path):
    write(tmp_path / "set", *arrays())
    state = state_of(tmp_path / "set")
    write(tmp_path / "set", pixels(N + 2), np.arange(N + 2))
    with pytest.raises(ValueError, match=r"examples was 60 .* is 62 now"):
        resume(state, tmp_path / "set")
    assert len(labels(take(resume(state, tmp_path / "set", on_changed_data="continue"), 9))) == 72


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["images", "lines"])
def test_other_formats(tmp_path, kind, streaming):
    if kind == "images":
        for k, image in enumerate(pixels(20)):
            (tmp_path / "set" / str(k % 2)).mkdir(parents=True, exist_ok=True)
            (tmp_path / "set" / str(k % 2) / f"{k}.bmp").write_bytes(encode(image, "BMP"))
        settings = {"path": "imagefolder", "data_files": {"train": f"{tmp_path}/set/*/*.bmp"}}
        edited = tmp_path / "set" / "1" / "13.bmp"
    else:
        lines = [
            {"image": (image % 90 + 10).tolist(), "label": k}
            for k, image in enumerate(pixels(20)[:, 0])
        ]
        edited = tmp_path / "x.jsonl"
        edited.write_text("\n".join(map(json.dumps, lines)))
        settings = {"path": "json", "data_files": {"train": str(edited)}, "steps_per_epoch": 2}
    settings["streaming"] = streaming
    path = settings.pop("path")
    state = state_of(path, **settings)
    resume(state, path, **settings)
    before = edited.stat()
    data = bytearray(edited.read_bytes())
    place = len(data) - 9 if kind == "images" else data.rindex(b'"label"') - 5
    data[place] ^= 1
    edited.write_bytes(data)
    os.utime(edited, (before.st_atime, before.st_mtime))
    with pytest.raises(ValueError, match="cannot resume the data"):
        resume(state, path, **settings)
    if kind == "images":  # another class, with the same bytes
        data[place] ^= 1
        edited.write_bytes(data)
        edited.rename(tmp_path / "set" / "0" / "13.bmp")
        with pytest.raises(ValueError, match="cannot resume the data"):
            resume(state, path, **settings)


def test_a_state_without_digests_is_accepted(tmp_path):
    """Of a server that has none, or of an older checkpoint."""
    write(tmp_path / "set", *arrays())
    state = state_of(tmp_path / "set")
    del state["settings"]["the content of the training data"]
    resume(state, tmp_path / "set")


# --- the digests


def test_blocks_of_large_files(tmp_path, monkeypatch):
    """All sizes, the blocks alone, and short columns as a whole."""
    monkeypatch.setattr(content, "BLOCK", 64)
    monkeypatch.setattr(content, "CONTENT", 40)
    monkeypatch.setattr(content, "SKETCH", 3)
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(np.random.default_rng(0).bytes(10_000))
    names = [str(file) for file in files]
    first = digests(names)
    assert first.keys() == {"sketch", "content"}
    assert digests(names) == first
    assert differ(first, digests(names[:2]))
    found = 0
    for place in range(0, 30_000, 60):
        file, at = files[place // 10_000], place % 10_000
        data = bytearray(file.read_bytes())
        data[at] ^= 1
        file.write_bytes(data)
        found += differ(first, digests(names))
        data[at] ^= 1
        file.write_bytes(data)
    assert 500 * 40 * 64 / 30_000 * 0.8 < found < 500 * 40 * 64 / 30_000 * 1.2
    files[1].write_bytes(files[1].read_bytes() + b"x")
    assert differ(first, digests(names))


def test_labels_of_large_files_are_read_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "BLOCK", 1)
    monkeypatch.setattr(content, "SHORT", 1000)
    images, numbers = arrays()
    write(tmp_path / "set", images, numbers)
    names = [str(file) for file in sorted((tmp_path / "set").iterdir())]
    first = digests(names)
    for k in range(0, N, 7):
        changed = numbers.copy()
        changed[k] += 1
        write(tmp_path / "set", images, changed)
        assert differ(first, digests(names)), k


def test_files_that_are_gone_have_none(tmp_path):
    assert digests([str(tmp_path / "missing")]) == {}
    assert digests(["http://127.0.0.1:9/x.parquet"]) == {}


# --- names that are patterns, too


@pytest.fixture
def odd(tmp_path):
    """A folder whose name is a pattern, and another that this pattern means."""
    for name, first in (("data [v1]", 0), ("data v", 100)):
        folder = tmp_path / name
        write_parquet(
            folder / "train.parquet", list(map(encode, pixels(9))), [*range(first, first + 9)]
        )
        write_parquet(folder / "test.parquet", list(map(encode, pixels(3))))
    return tmp_path / "data [v1]"


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("path", "files"),
    [
        ("data [v1]", None),
        ("./data [v1]", None),
        ("data [v1]/train.parquet", None),
        ("data [v1]", {"train": "train.parquet"}),
        ("data [v1]", {"train": "tr*.parquet"}),
        ("parquet", {"train": "data [v1]/train.parquet"}),
        ("parquet", {"train": ["{odd}/train.parquet"]}),
        ("parquet", {"train": "{odd}/tr*.parquet"}),
    ],
)
def test_what_exists_is_meant_literally(odd, monkeypatch, path, files, streaming):
    monkeypatch.chdir(odd.parent)
    if files:
        files = json.loads(json.dumps(files).replace("{odd}", str(odd)))
    data = module(path, data_files=files, val_split=None, streaming=streaming)
    assert set(labels(take(data.train_dataloader(), 2))) == set(range(9))


def test_a_pattern_is_a_pattern_where_nothing_has_its_name(odd, monkeypatch):
    monkeypatch.chdir(odd.parent)
    for pattern in ("data ?/train.parquet", "data [uv]/train.parquet", "data v/tr*"):
        data = module("parquet", data_files={"train": pattern}, val_split=None)
        assert set(labels(take(data.train_dataloader(), 2))) == set(range(100, 109))
    both = {"train": ["data [v1]/train.parquet", "data v/*.parquet"]}
    data = module("parquet", data_files=both, val_split=None)
    assert data._train.source.total == 9 + 9 + 3


@pytest.mark.parametrize("streaming", [True, False])
def test_a_folder_of_images_whose_name_is_a_pattern(tmp_path, streaming):
    for k, image in enumerate(pixels(9)):
        file = tmp_path / "a*[b]" / "train" / str(k % 3) / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
    (tmp_path / "a*[b]" / "README.md").write_text("Images.")
    data = module(tmp_path / "a*[b]", val_split=None, streaming=streaming)
    assert data._train.source.total == 9


@pytest.mark.parametrize(
    "arguments",
    [
        {"path": ""},
        {"path": "  "},
        {"path": "parquet", "data_files": {"train": ""}},
        {"path": "parquet", "data_files": {"train": []}},
        {"path": "parquet", "data_files": {}},
        {"path": "parquet", "data_files": {"train": ["train.parquet", ""]}},
    ],
    ids=str,
)
def test_empty_names_do_not_mean_the_current_folder(odd, monkeypatch, arguments):
    monkeypatch.chdir(odd)
    with pytest.raises(ValueError, match=r"data\.(path|data_files)"):
        module(**arguments)
