"""Bad data: what cannot be used is left out, named, counted and told once, and ends no run.

Labels of the small data sets made here are the examples' numbers, so a batch tells who is in it.
"""

import csv
import io
import json
import struct
import tarfile
import zlib
from collections import Counter

import lightning as L
import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from image_files import (
    PARDONS,
    encode,
    labels,
    module,
    pixels,
    same,
    saved,
    serving,
    stored,
    take,
    write_parquet,
)
from PIL import Image

from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading import retry as network
from lit_diffusion.training.data.reading.bad_examples import Bad

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in (*PARDONS, "ignore:.*skipped ")]

N, BAD = 240, (3, 50, 51, 120, 239)
GENEROUS = {"max_bad_share": 0.2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """240 images in three files, row groups of twenty; five bad, of five kinds; ten to check."""
    folder = tmp_path_factory.mktemp("bad")
    images = [encode(image) for image in pixels(N)]
    images[3], images[50], images[120] = b"", images[50][:-30], None
    images[51] = encode(pixels(1, (1, 9, 8))[0])
    numbers = [None if i == 239 else i for i in range(N)]
    for k in range(3):
        part = slice(80 * k, 80 * (k + 1))
        write_parquet(folder / f"train-{k:05d}-of-00003.parquet", images[part], numbers[part], 20)
    write_parquet(folder / "test.parquet", [*images[:10], encode(pixels(1)[0])])
    return folder


def listed(path):
    with (path / "bad_examples.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# --- the stream goes on


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flip", [False, True])
def test_bad_examples_are_left_out_and_batches_stay_full(folder, workers, flip):
    data = module(folder, num_workers=workers, horizontal_flip=flip, **GENEROUS)
    loader = data.train_dataloader()
    batches = take(loader, 2 * 235 // 8)
    assert all(len(batch["label"]) == 8 for batch in batches)
    assert all(torch.equal(batch["label"], batch["index"]) for batch in batches)
    counts = Counter(labels(batches))
    assert set(counts) == set(range(N)) - set(BAD)
    assert max(counts.values()) <= 3
    read, bad = loader.counts()
    assert read - bad == len(labels(batches))
    assert 8 <= bad <= 10


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_left_out_is_the_same_after_a_resumption(folder, workers):
    settings = {"num_workers": workers, "shuffle_window": 50, **GENEROUS}
    for step in (1, 5, 13, 30):
        loader = module(folder, **settings).train_dataloader()
        take(loader, step)
        state = torch.load(saved(loader.state_dict()), weights_only=True)
        expected = take(loader, 40)
        resumed = module(folder, **settings).train_dataloader()
        resumed.load_state_dict(state)
        assert same(take(resumed, 40), expected)
        assert resumed.counts() == loader.counts()
        assert json.dumps(resumed.state_dict()) == json.dumps(loader.state_dict())


@pytest.mark.parametrize("workers", [0, 2])
def test_raise_names_the_example(folder, workers):
    loader = module(folder, num_workers=workers, on_bad_example="raise", val_split=None)
    with pytest.raises(ValueError, match=r"^row \d+ of \S+\.parquet, split 'train': expected .*"):
        take(loader.train_dataloader(), 30)


def test_too_many_end_the_run(tmp_path):
    images = [encode(image) for image in pixels(200)]
    images[50::10] = [b"broken"] * 15
    write_parquet(tmp_path / "x.parquet", images)
    settings = {"val_split": None, "shuffle_window": 5, "open_shards": 1}
    with pytest.raises(ValueError, match=r"expected a share of at most 0\.01") as caught:
        take(module(tmp_path / "x.parquet", **settings).train_dataloader(), 25)
    message = str(caught.value)
    assert "got 10 of the" in message
    assert "data.max_bad_share" in message
    assert message.count("x.parquet: expected an image that can be decoded, got 6 bytes") == 5
    assert "\n" not in message
    take(module(tmp_path / "x.parquet", max_bad_share=0.1, **settings).train_dataloader(), 50)


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.01, 1.0])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_of_nothing_but_bad_examples_ends(tmp_path, workers, share):
    good, bad = [encode(image) for image in pixels(2)], [b"broken"] * 100
    write_parquet(tmp_path / "x.parquet", good + bad)
    settings = {"val_split": None, "max_bad_share": share, "num_workers": workers}
    loader = module(tmp_path / "x.parquet", batch_size=300, **settings).train_dataloader()
    if share < 1:
        with pytest.raises(ValueError, match="expected a share of at most"):
            take(loader, 1)
    else:
        assert len(take(loader, 1)[0]["label"]) == 300


def test_an_epoch_without_one_good_example_ends_the_run(tmp_path):
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(30)])
    data = module(tmp_path / "x.parquet", val_split=None, max_bad_share=1.0)
    loader = data.train_dataloader()
    data._train.decode = lambda examples, _: [Bad("", one.index, 1, "spoilt") for one in examples]
    with pytest.raises(ValueError, match=r"example \d+, split 'train': spoilt"):
        take(loader, 1)


def test_a_wrong_configuration_is_told_at_once(tmp_path):
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(150)])
    with pytest.raises(ValueError, match=r"row 0 of .* expected an image of height × width 9"):
        module(tmp_path / "x.parquet", shape=(1, 9, 9), val_split=None)
    images = [b""] * 5 + [encode(image) for image in pixels(145)]
    write_parquet(tmp_path / "y.parquet", images)
    module(tmp_path / "y.parquet", val_split=None).train_dataloader()


# --- shards


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-500])


def scrambled(file, begin=0.4, end=0.5):
    """Overwrite the middle of the data; the footer stays whole."""
    data = bytearray(file.read_bytes())
    part = slice(int(len(data) * begin), int(len(data) * end))
    data[part] = np.random.default_rng(0).bytes(part.stop - part.start)
    file.write_bytes(data)


def hundred(folder, files=5, each=40):
    for k in range(files):
        images = [encode(image) for image in pixels(each, seed=k)]
        numbers = list(range(k * each, (k + 1) * each))
        name = f"train-{k:05d}-of-{files:05d}.parquet"
        write_parquet(folder / name, images, numbers, group=20)
    return sorted(folder.glob("*.parquet"))


@pytest.mark.parametrize("which", [0, 2])
def test_a_truncated_file_is_left_out_and_named(tmp_path, which):
    files = hundred(tmp_path / "set")
    cut_short(files[which])
    settings = {"val_split": None, "max_bad_share": 0.3}
    with pytest.warns(UserWarning, match=f"skipped rows 0 to 39 of .*{files[which].name}"):
        data = module(tmp_path / "set", **settings)
    assert data._train.source.total == 160
    gone = set(range(40 * which, 40 * which + 40))
    assert sorted(labels(take(data.train_dataloader(), 20))) == sorted(set(range(200)) - gone)
    with pytest.raises(ValueError, match="got 40 of the 200 examples"):
        module(tmp_path / "set", val_split=None)
    with pytest.raises(ValueError, match=files[which].name):
        module(tmp_path / "set", val_split=None, on_bad_example="raise")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("harm", ["vanished", "scrambled"])
def test_a_shard_that_cannot_be_read_on(tmp_path, harm, workers):
    """Its rows are counted, the others come as before, and a resumption sees the same."""
    files = hundred(tmp_path / "set")
    settings = {"val_split": None, "max_bad_share": 1.0, "num_workers": workers}
    settings |= {"shuffle_window": 16}
    data, other = module(tmp_path / "set", **settings), module(tmp_path / "set", **settings)
    loader, resumed = data.train_dataloader(), other.train_dataloader()
    if harm == "vanished":
        files[1].unlink()
    else:
        scrambled(files[1], 0.0, 0.9)
    begun = take(loader, 9)
    state = loader.state_dict()
    expected = take(loader, 20)
    whole = labels(begun + expected)
    assert set(range(200)) - set(range(40, 80)) <= set(whole)
    read, bad = loader.counts()
    assert read - bad == len(whole)
    assert 40 <= bad <= 80
    resumed.load_state_dict(state)
    assert same(take(resumed, 20), expected)
    assert resumed.counts() == (read, bad)


def test_a_tar_that_ends_early(tmp_path):
    """A format whose rows nobody has counted: the rest of the shard is one bad example."""
    for k in range(3):
        with tarfile.open(tmp_path / f"{k}.tar", "w") as tar:
            for i in range(20):
                number = 20 * k + i
                image = encode(pixels(1, seed=number)[0])
                for name, data in (
                    (f"{number:03d}.png", image),
                    (f"{number:03d}.cls", b"%d" % number),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    middle = tmp_path / "1.tar"
    middle.write_bytes(middle.read_bytes()[: 10 * 2 * 1024 + 700])
    settings = {"image_key": "png", "label_key": "cls", "val_split": None, "max_bad_share": 0.5}
    files = {"train": str(tmp_path / "*.tar")}
    data = module("webdataset", data_files=files, open_shards=2, shuffle_window=8, **settings)
    seen = Counter(labels(take(data.train_dataloader(), 20)))
    assert set(range(20)) | set(range(40, 60)) <= set(seen)
    assert set(range(20, 30)) <= set(seen)
    assert not set(range(31, 40)) & set(seen)


def test_a_remote_file_that_is_gone_is_bad_and_not_the_network(tmp_path, monkeypatch):
    monkeypatch.setattr(network, "FIRST_WAIT", 60.0)
    files = hundred(tmp_path / "set")
    with serving(tmp_path / "set") as server:
        urls = {"train": [f"{server.url}/{file.name}" for file in files]}
        settings = {"val_split": None, "max_bad_share": 1.0, "shuffle_window": 16}
        data = module("parquet", data_files=urls, **settings)
        files[1].unlink()
        seen = labels(take(data.train_dataloader(), 20))
    assert sorted(set(seen)) == sorted(set(range(200)) - set(range(40, 80)))


# --- validation


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_leaves_out_the_same_on_any_number_of_ranks(folder, world, batch_size):
    settings = {"batch_size": batch_size, **GENEROUS}
    loaders = [
        module(folder, (rank, world), "validate", **settings).val_dataloader()
        for rank in range(world)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    assert labels(batches) == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10]
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(10))
    assert {batch["total"] for batch in batches} == {10}
    with pytest.raises(ValueError, match=r"row 3 of \S+test.parquet, split 'test'"):
        module(folder, stage="validate", on_bad_example="raise").val_dataloader()


# --- reports


class Small(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return (self.weight - batch["image"].mean()) ** 2

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, root, steps, ckpt_path=None, **arguments):
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=root,
    )
    data = DataModule(str(folder), batch_size=8, **GENEROUS, **arguments)
    trainer.fit(Small(), datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_lists_each_bad_example_once(folder, tmp_path, workers):
    trainer = fit(folder, tmp_path, 20, num_workers=workers)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    fit(folder, tmp_path, 100, num_workers=workers)
    once = listed(tmp_path)
    train = [row for row in once if row["split"] == "train"]
    assert sorted(80 * int(row["file"][-18]) + int(row["row"]) for row in train) == sorted(BAD)
    assert {row["epoch"] for row in train} == {"0"}
    assert {row["rows"] for row in train} == {"1"}
    assert [row["row"] for row in once if row["split"] == "test"] == ["3"]
    reasons = " ".join(row["reason"] for row in train)
    for reason in (
        "image, got none",
        "can be decoded",
        "8 × 8, got 9 × 8",
        "integer label, got none",
    ):
        assert reason in reasons
    fit(folder, tmp_path, 100, ckpt_path=tmp_path / "x.ckpt", num_workers=workers)
    assert listed(tmp_path) == once


@pytest.mark.parametrize("streaming", [True, False])
def test_a_bad_file_of_a_folder_of_images_is_named(tmp_path, streaming):
    for k, image in enumerate(pixels(20)):
        file = tmp_path / "set" / "train" / str(k % 2) / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image) if k != 7 else b"broken")
    fit(tmp_path / "set", tmp_path, 6, streaming=streaming, val_split=None)
    (row,) = listed(tmp_path)
    assert row["file"] == str(tmp_path / "set" / "train" / "1" / "7.png")


def test_the_first_few_are_warned_of(folder):
    with pytest.warns(UserWarning, match="skipped row") as caught:
        take(module(folder, (1, 2), val_split=None, **GENEROUS).train_dataloader(), 60)
    told = [str(one.message) for one in caught if "skipped" in str(one.message)]
    assert 2 <= len(told) <= 5
    assert all(line.startswith("[rank: 1] skipped row ") for line in told)


# --- thirty kinds of record


SHAPE = (3, 12, 16)


def photograph(random, mode="RGB", size=(16, 12)):
    array = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(array).convert(mode)


def flipped(data, random, n=8, begin=0):
    data = bytearray(data)
    for place in random.integers(begin, len(data), n):
        data[place] ^= 1 << random.integers(8)
    return bytes(data)


def chunk(kind, body, crc=None):
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)


def png(width, height, body=b"", depth=8):
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(body))
        + chunk(b"IEND", b"")
    )


def upright(image, orientation):
    """The same picture, stored on its side or mirrored, with the EXIF tag that says so."""
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(image.transpose(undo[orientation]), "PNG", exif=exif.tobytes())


def film(random, kind):
    frames = [photograph(random) for _ in range(2)]
    return stored(frames[0], kind, save_all=True, append_images=frames[1:])


def see_through(random):
    image = photograph(random, "RGBA")
    image.putalpha(100)
    return stored(image)


def sixteen_bit_colour(random):
    rows = b"".join(b"\x00" + random.bytes(16 * 6) for _ in range(12))
    return png(16, 12, rows, depth=16)


def bad_crc(random):
    data = bytearray(stored(photograph(random)))
    data[data.index(b"IDAT") + 20] ^= 255
    return bytes(data)


def jpeg_bomb(random):
    data = bytearray(stored(photograph(random), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    return bytes(data)


def random_bytes(random):
    return random.bytes(int(random.integers(1, 3000)))


# kind -> a record made of random numbers. What cannot be used:
WRONG = {
    "null": lambda r: None,
    "empty": lambda r: b"",
    "random bytes": random_bytes,
    "random after PNG's first": lambda r: b"\x89PNG\r\n\x1a\n" + random_bytes(r),
    "random after JPEG's first": lambda r: b"\xff\xd8\xff\xe0" + random_bytes(r),
    "random after GIF's first": lambda r: b"GIF89a" + random_bytes(r),
    "random after WebP's first": lambda r: b"RIFF\x99\x00\x00\x00WEBPVP8 " + random_bytes(r),
    "random after TIFF's first": lambda r: b"II*\x00" + random_bytes(r),
    "text": lambda r: b"<html>404 Not Found</html>",
    "PNG cut": lambda r: (d := stored(photograph(r)))[: r.integers(1, len(d) - 16)],
    "JPEG cut": lambda r: (d := stored(photograph(r), "JPEG"))[: r.integers(1, len(d) // 2)],
    "GIF cut": lambda r: (d := stored(photograph(r), "GIF"))[: r.integers(1, len(d) // 2)],
    "PNG of flipped bits": lambda r: flipped(stored(photograph(r)), r, begin=8),
    "PNG with a bad CRC": bad_crc,
    "other size": lambda r: stored(photograph(r, size=(17, 12)), "JPEG"),
    "one pixel": lambda r: stored(photograph(r, size=(1, 1))),
    "large": lambda r: stored(Image.new("RGB", (900, 700)), "JPEG"),
    "no width": lambda r: png(0, 12),
    "PNG bomb": lambda r: png(60_000, 60_000, bytes(5000)),
    "JPEG bomb": jpeg_bomb,
    "BMP bomb": lambda r: (
        (d := stored(photograph(r), "BMP"))[:18] + struct.pack("<ii", 40000, 40000) + d[26:]
    ),
    "grey": lambda r: stored(photograph(r, "L")),
    "transparent": see_through,
    "animated GIF": lambda r: film(r, "GIF"),
    "animated WebP": lambda r: film(r, "WEBP"),
    "TIFF of two pages": lambda r: film(r, "TIFF"),
    "16-bit grey": lambda r: stored(
        Image.fromarray(r.integers(0, 65536, (12, 16)).astype(np.uint16))
    ),
    "16-bit colour": sixteen_bit_colour,
    "floats in TIFF": lambda r: stored(
        Image.fromarray(r.random((12, 16), dtype=np.float32)), "TIFF"
    ),
}
# What may or may not be found out: the decoder sees nothing wrong with some.
UNCERTAIN = {
    "JPEG of flipped bits": lambda r: flipped(stored(photograph(r), "JPEG"), r, begin=200),
    "GIF of flipped bits": lambda r: flipped(stored(photograph(r), "GIF"), r),
    "WebP of flipped bits": lambda r: flipped(stored(photograph(r), "WEBP"), r),
    "TIFF of flipped bits": lambda r: flipped(stored(photograph(r), "TIFF"), r),
}


def right(kind, random):
    """A record that is right, and the pixels it must give."""
    image = photograph(random)
    array = np.asarray(image)
    if kind == "upright":
        return upright(image, int(random.integers(2, 9))), array
    if kind == "CMYK":
        data = stored(image.convert("CMYK"), "JPEG", quality=95)
        with Image.open(io.BytesIO(data)) as picture:
            return data, np.asarray(picture.convert("RGB"))
    if kind == "palette":
        return stored(small := image.quantize(16)), np.asarray(small.convert("RGB"))
    if kind == "opaque":
        return stored(image.convert("RGBA")), array
    return stored(image, kind), array


RIGHT = ["PNG", "BMP", "TIFF", "upright", "CMYK", "palette", "opaque"]


def check_records(tmp_path, n):
    """Stream n records of all kinds: none ends the run, each bad one is counted, others right."""
    random = np.random.default_rng(0)
    kinds = [*WRONG, *UNCERTAIN, *RIGHT]
    assert len(WRONG) + len(UNCERTAIN) >= 30
    chosen = [kinds[k % len(kinds)] for k in range(n)]
    random.shuffle(chosen)
    records, expected = [], {}
    for index, kind in enumerate(chosen):
        if kind in RIGHT:
            data, expected[index] = right(kind, random)
        else:
            data = {**WRONG, **UNCERTAIN}[kind](random)
        records.append({"bytes": data, "path": None})
    image = pa.array(records, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    table = pa.table({"image": image, "label": np.arange(n)})
    parquet.write_table(table, tmp_path / "records.parquet", row_group_size=100)
    data = module(
        tmp_path / "records.parquet",
        shape=SHAPE,
        val_split="train",
        val_examples=None,
        max_bad_share=1.0,
        batch_size=50,
    )
    loader = data.train_dataloader()
    reports = []
    loader.bad_examples.add = reports.extend
    kept = {}
    while not reports or reports[-1].epoch < 1:  # the whole of epoch 0, and into the next
        for batch in take(loader, 1):
            kept |= dict(zip(batch["index"].tolist(), batch["image"], strict=True))
    bad = {one.row: one.reason for one in reports if one.epoch == 0}
    assert len(bad) == sum(one.epoch == 0 for one in reports)
    assert set(bad) | set(kept) == set(range(n))
    assert not set(bad) & set(kept)
    for index, kind in enumerate(chosen):
        if kind in WRONG:
            assert index in bad, f"{kind} was taken for an image"
            assert bad[index].startswith("expected ")
            assert "\n" not in bad[index]
        elif kind in RIGHT:
            assert index not in bad, f"{kind}: {bad.get(index)}"
            difference = kept[index].permute(1, 2, 0).numpy().astype(int) - expected[index]
            assert np.abs(difference).max() <= (3 if kind == "CMYK" else 0), kind
    val = torch.cat([batch["label"] for batch in data.val_dataloader()]).tolist()
    assert sorted(val) == sorted(kept)


def test_records_of_all_kinds(tmp_path):
    check_records(tmp_path, 600)


@pytest.mark.soak
def test_ten_thousand_records_of_all_kinds(tmp_path):
    check_records(tmp_path, 10_000)
