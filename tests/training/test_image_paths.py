"""What a row may name: image files below the data set's folder, in formats that are known.

Whatever else it names is a bad example, and is not opened.
"""

import io
import os
import struct
import zipfile

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from image_files import PARDONS, encode, labels, module, pixels, stored, take
from PIL import Image

from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.reading import image_paths
from lit_diffusion.training.data.reading.columns import MisfitError
from lit_diffusion.training.data.reading.image_paths import ImagePaths
from lit_diffusion.training.data.reading.source import Example

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in (*PARDONS, "ignore:.*skipped ")]

N = 30
STRUCT = pa.struct({"bytes": pa.binary(), "path": pa.string()})


@pytest.fixture
def folder(tmp_path):
    """An image, a device, a pipe and others, inside the folder of a data set and outside."""
    for place in (tmp_path / "outside.png", tmp_path / "set" / "inner" / "good.png"):
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(encode(pixels(1, seed=5)[0]))
    folder = tmp_path / "set"
    os.mkfifo(folder / "pipe")
    (folder / "device").symlink_to("/dev/zero")
    (folder / "link.png").symlink_to(tmp_path / "outside.png")
    with (folder / "huge.png").open("wb") as file:
        file.truncate(image_paths.LARGEST + 1)
    return folder


REFUSED = {
    "/dev/zero": "not in that folder",
    "/etc/hostname": "not in that folder",
    "{set}/../outside.png": "not in that folder",
    "../outside.png": "not in that folder",
    "{set}x/1.png": "not in that folder",
    "http://127.0.0.1:9/inner/good.png": "not in that folder",
    "file://{set}/inner/good.png": "not in that folder",
    "local://{set}/inner/good.png": "not in that folder",
    "simplecache::http://127.0.0.1:9/x.png": "not in that folder",
    "simplecache::{set}/inner/good.png": "not in that folder",
    "zip://x.png::http://127.0.0.1:9/x.zip": "not in that folder",
    "{set}/pipe": "no regular file",
    "{set}/inner": "no regular file",
    "{set}/device": "no regular file",
    "{set}/huge.png": "at most",
    "{set}/missing.png": "No such file",
    "{set}/" + 300 * "x": "File name too long",
    "": "got none",
}


def test_what_is_not_a_file_of_the_folder_is_not_opened(folder, monkeypatch):
    def opened(path, *rest):
        raise AssertionError(f"opened {path}")

    monkeypatch.setattr(fsspec, "open", opened)
    paths = ImagePaths((str(folder),))
    for path, reason in REFUSED.items():
        with pytest.raises(MisfitError, match=reason):
            paths.read(path.replace("{set}", str(folder)))
    with pytest.raises(MisfitError, match="not in that folder"):
        ImagePaths().read(str(folder / "inner" / "good.png"))


def test_files_of_the_folder_are_read(folder, monkeypatch):
    good = (folder / "inner" / "good.png").read_bytes()
    paths = ImagePaths((str(folder),))
    for path in (folder / "inner" / "good.png", "inner/good.png", folder / "link.png"):
        assert paths.read(str(path)) == good
    monkeypatch.chdir(folder.parent)
    assert paths.read("set/inner/good.png") == good
    with zipfile.ZipFile(folder / "x.zip", "w") as archive:
        archive.writestr("a/b.png", good)
        archive.writestr("bomb", bytes(300))
    assert paths.read(f"zip://a/b.png::{folder}/x.zip") == good
    monkeypatch.setattr(image_paths, "LARGEST", 200)
    with pytest.raises(MisfitError, match="at most 200 bytes"):
        paths.read(f"zip://bomb::{folder}/x.zip")


def write(file, images, **columns):
    table = {"image": pa.array(images, STRUCT), "label": np.arange(len(images))} | columns
    parquet.write_table(pa.table(table), file, row_group_size=10)


@pytest.mark.parametrize("streaming", [True, False])
def test_rows_that_name_a_device_or_a_pipe_are_bad_examples(folder, streaming):
    rows = [{"bytes": encode(image), "path": None} for image in pixels(N)]
    rows[3] = {"bytes": None, "path": "/dev/zero"}
    rows[7] = {"bytes": None, "path": str(folder / "pipe")}
    rows[11] = {"bytes": None, "path": "inner/good.png"}
    write(folder / "x.parquet", rows)
    settings = {"val_split": None, "streaming": streaming, "max_bad_share": 0.2}
    data = module(folder / "x.parquet", **settings)
    batches = take(data.train_dataloader(), 2 * (N - 2) // 8)
    assert set(labels(batches)) == set(range(N)) - {3, 7}
    named = next(batch for batch in batches if 11 in batch["label"])
    place = named["label"].tolist().index(11)
    assert torch.equal(named["image"][place], torch.from_numpy(pixels(1, seed=5)[0]))


@pytest.mark.parametrize("streaming", [True, False])
def test_other_columns_of_images_are_not_opened(folder, streaming):
    """``datasets`` would decode the first row with whatever program the format calls for."""
    import datasets

    file = folder / "x.parquet"
    rows = [{"bytes": encode(image), "path": None} for image in pixels(N)]
    write(file, rows, other=pa.array([{"bytes": None, "path": str(folder / "pipe")}] * N, STRUCT))
    table = datasets.Dataset.from_parquet(str(file), cache_dir=str(folder / "cache"))
    for name in ("image", "other"):
        table = table.cast_column(name, datasets.Image(decode=False))
    table = table.cast_column("image", datasets.Image())
    table = table.cast_column("other", datasets.Image())
    parquet.write_table(table.with_format("arrow")[:], file)
    files = {"train": str(file)}
    module("parquet", data_files=files, val_split=None, streaming=streaming)


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_folders_of_images_and_of_archives(tmp_path, streaming, packed):
    (tmp_path / "set" / "train").mkdir(parents=True)
    files = {f"{k % 2}/{k}.png": encode(image) for k, image in enumerate(pixels(N))}
    if packed:  # without classes, which ``datasets`` does not find in archives
        files = {name.replace("/", "-"): data for name, data in files.items()}
        with zipfile.ZipFile(tmp_path / "set" / "train" / "x.zip", "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        for name, data in files.items():
            (tmp_path / "set" / "train" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "set" / "train" / name).write_bytes(data)
    data = module(tmp_path / "set", val_split=None, streaming=streaming, label_key=None)
    seen = torch.cat([batch["image"] for batch in take(data.train_dataloader(), 3 * N // 8)])
    assert {bytes(one.numpy()) for one in seen} == {bytes(one) for one in pixels(N)}


# --- formats


def decode(data, shape=(3, 12, 16)):
    return ImageDecoder(shape, labels=False)(Example(0, data, None)).image


def colour(mode="RGB"):
    return Image.fromarray(pixels(1, (12, 16, 3))[0]).convert(mode)


@pytest.mark.parametrize("kind", ["EPS", "PCX", "SGI", "TGA", "ICO", "MSP"])
def test_formats_that_are_not_named_are_not_opened(kind):
    """EPS starts another program; none of the others is a format of data sets."""
    data = stored(colour("1" if kind == "MSP" else "RGB"), kind)
    with pytest.raises(MisfitError, match="can be decoded"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "JPEG"])
def test_formats_that_are_named_are(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    exact = np.asarray(colour()).transpose(2, 0, 1)
    found = decode(stored(colour(), kind, **options)).numpy()
    assert found.shape == exact.shape
    assert kind == "JPEG" or np.array_equal(found, exact)


def test_a_jpeg_cannot_hide_its_size():
    """Behind a marker without a segment, which a reader of segments would skip with its frame."""
    data = bytearray(stored(colour(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    disguise = b"\xff\xc0" + struct.pack(">HBHHB", 11, 8, 12, 16, 3) + bytes(9)
    for bare in (b"\xff\x01", b"\xff\xd0", b"\xff\x00"):
        length = struct.pack(">H", len(data))  # as a segment, it would reach to the disguise
        with pytest.raises(MisfitError, match="got 65000 × 65000"):
            decode(bytes(data[:2]) + bare + length + bytes(data[2:]) + disguise)


# --- numpy's format


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def claiming(shape):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(64)


@pytest.mark.parametrize("shape", [(10**6, 10**6), (1, 10**9, 10**9), (1, 4, 5), (2**40, 2**40)])
def test_an_array_that_claims_more_than_it_holds_is_bad(shape):
    with pytest.raises(MisfitError, match=r"whole \.npy array, got 64 bytes"):
        decode(claiming(shape), (1, 4, 4))


@pytest.mark.parametrize("value", [1e300, -1e39, np.inf, np.nan])
def test_numbers_are_finite_in_the_type_they_are_used_in(value):
    array = np.zeros((1, 4, 4))
    array[0, 1, 2] = value
    with pytest.raises(MisfitError, match="finite numbers"):
        decode(npy(array), (1, 4, 4))


@pytest.mark.parametrize("kind", ["<f8", ">f4", "<f2", "u1", ">i8", "F", "1 kept"])
def test_whole_arrays_are_read(kind):
    array = np.arange(16).reshape(1, 4, 4)
    if kind == "F":
        array = np.asfortranarray(array.reshape(4, 4).astype(np.float32))[None]
    elif kind != "1 kept":
        array = array.astype(kind)
    found = decode(npy(array), (1, 4, 4))
    assert np.array_equal(found.numpy(), np.arange(16).reshape(1, 4, 4))


@pytest.mark.parametrize("streaming", [True, False])
def test_one_damaged_array_does_not_end_a_run(tmp_path, streaming):
    rows = [{"bytes": npy(np.full((1, 4, 4), k, np.float32)), "path": None} for k in range(N)]
    rows[5] = {"bytes": claiming((10**6, 10**6)), "path": None}
    write(tmp_path / "x.parquet", rows)
    settings = {"shape": (1, 4, 4), "streaming": streaming, "max_bad_share": 0.1}
    data = module(tmp_path / "x.parquet", val_split=None, **settings)
    batches = take(data.train_dataloader(), 2 * N // 8)
    assert set(labels(batches)) == set(range(N)) - {5}
    assert torch.equal(batches[0]["image"][:, 0, 0, 0], batches[0]["label"].float())
