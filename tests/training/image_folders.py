"""Kinds of data that a user may have, made from formulas.

Each is a function of an empty folder that fills it and returns the path to name. The first are of
images to train on, the others cannot be used.
"""

import io
import tarfile

import datasets
import numpy as np
from image_files import encode, write_parquet
from PIL import Image


def photograph(i, size=(24, 24), mode="RGB"):
    """A picture of smooth waves, different for each number, of a size (width, height)."""
    x, y = np.meshgrid(np.arange(size[0]) / 7, np.arange(size[1]) / 5)
    waves = np.stack([np.sin(x + i), np.cos(y - i), np.sin(x * y / 4 + i)], axis=-1)
    return Image.fromarray(np.uint8(np.round((waves + 1) * 127.5))).convert(mode)


def save(folder, pictures, suffix="png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:03d}.{suffix}")
    return folder


# Images to train on


def mixed(folder):
    """JPEG and PNG of many sizes, some grey, one broken, rubbish of two systems, an animation."""
    sizes = [(40, 30), (30, 40), (64, 48), (33, 57)]
    save(folder, [photograph(i, sizes[i % 4]) for i in range(30)], "jpg")
    save(folder, [photograph(i, (50, 41), "L") for i in range(30, 36)])
    (folder / "broken.jpg").write_bytes((folder / "000.jpg").read_bytes()[:200])
    (folder / "Thumbs.db").write_bytes(b"\0rubbish")
    (folder / ".DS_Store").write_bytes(b"\0rubbish")
    (folder / "a picture of Zoë, größer.JPG").write_bytes((folder / "001.jpg").read_bytes())
    frames = [photograph(i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


def classes(folder):
    for k, name in enumerate(["cat", "großer Hund"]):
        save(folder / name, [photograph(10 * k + i) for i in range(8 + 4 * k)])
    return folder


def splits(folder):
    for split, n in (("train", 6), ("test", 3)):
        for k, name in enumerate("ab"):
            save(folder / split / name, [photograph(10 * k + i) for i in range(n)])
    return folder


def nested(folder):
    save(folder / "2021" / "summer", [photograph(i) for i in range(5)])
    save(folder / "2022", [photograph(i) for i in range(5, 12)])
    return folder


def labelled_parquet(folder):
    images = [encode(np.asarray(photograph(i)).transpose(2, 0, 1)) for i in range(24)]
    write_parquet(folder / "train.parquet", images, labels=[i % 3 for i in range(24)])
    return folder


def plain_parquet(folder):
    images = [{"bytes": encode(np.asarray(photograph(i, mode="L"))[None])} for i in range(24)]
    table = datasets.Dataset.from_dict({"picture": images, "note": ["-"] * 24})
    table.to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def single_bits(folder):
    return save(folder, [photograph(i, (16, 16), "1") for i in range(12)])


def one_image(folder):
    return save(folder, [photograph(0)])


def grey_in_colour(folder):
    return save(folder, [photograph(i, mode="L").convert("RGB") for i in range(12)], "jpg")


def tar(folder):
    with tarfile.open(folder / "shard-0.tar", "w") as archive:
        for i in range(24):
            for suffix, data in (
                (".png", encode(np.asarray(photograph(i)).transpose(2, 0, 1))),
                (".cls", b"%d" % (i % 2)),
            ):
                entry = tarfile.TarInfo(f"{i:04d}{suffix}")
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
    return folder / "shard-0.tar"


def transparent(folder):
    """Icons: each has transparent pixels."""
    for i in range(12):
        picture = photograph(i).convert("RGBA")
        picture.putalpha(photograph(i + 50, mode="L"))
        picture.save(folder / f"{i}.png")
    return folder


def opaque(folder):
    """Screen shots with an alpha channel that says nothing, one of them with a hole."""
    save(folder, [photograph(i, mode="RGBA") for i in range(11)])
    transparent(folder / "..")
    for i in range(12):
        file = folder.parent / f"{i}.png"
        file.rename(folder / "hole.png") if i == 0 else file.unlink()
    return folder


def cmyk(folder):
    """Upright and turned photographs for print."""
    for i in range(12):
        exif = Image.Exif()
        exif[0x0112] = 6 if i % 2 else 1
        size = (20, 24) if i % 2 else (24, 20)
        photograph(i, size, "CMYK").save(folder / f"{i}.jpg", exif=exif)
    return folder


def partly_deep(folder):
    save(folder, [photograph(i, mode="L") for i in range(24)])
    Image.fromarray(np.full((24, 24), 1000, np.uint16)).save(folder / "deep.png")
    return folder


def tars(folder):
    tar(folder)
    return folder


def hub_clone(folder):
    """A data set as it is cloned from the hub: a card, and parquet files in data/."""
    (folder / "data").mkdir()
    labelled_parquet(folder / "data")
    (folder / "data" / "train.parquet").rename(folder / "data/train-00000-of-00001.parquet")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A data set\n")
    return folder


# Arrays to train on


def arrays(folder):
    pictures = np.stack([np.asarray(photograph(i)) for i in range(24)])
    np.save(folder / "images.npy", pictures)
    return folder


def an_array(folder):
    np.save(folder / "x.npy", np.stack([np.asarray(photograph(i, mode="L")) for i in range(24)]))
    return folder / "x.npy"


def archive(folder):
    pictures = np.stack([np.asarray(photograph(i)).transpose(2, 0, 1) for i in range(24)])
    arrays = {"x_train": pictures, "y_train": np.arange(24) % 3}
    np.savez(folder / "images.npz", **arrays, x_test=pictures[:6], y_test=np.arange(6) % 3)
    return folder / "images.npz"


def a_file_each(folder):
    for i in range(24):
        (folder / "ab"[i % 2]).mkdir(exist_ok=True)
        np.save(folder / "ab"[i % 2] / f"{i}.npy", np.asarray(photograph(i)))
    return folder


# Arrays and lists of other kinds


def waves(n, length, channels=()):
    phase = np.random.default_rng(0).normal(size=(n, *channels, 1)) * 3
    return (np.sin(np.arange(length) / 9 + phase) * 5 + 20).astype(np.float32)


def series(folder):
    np.save(folder / "x.npy", waves(24, 100))
    return folder / "x.npy"


def channels_last(folder):
    np.savez(folder / "x.npz", x=waves(24, 64, (3,)).transpose(0, 2, 1), y=np.arange(24) % 2)
    return folder / "x.npz"


def listed_series(folder):
    values = {"ecg": waves(24, 50).tolist(), "label": [i % 2 for i in range(24)]}
    datasets.Dataset.from_dict(values).to_parquet(folder / "train.parquet")
    return folder


def listed_points(folder):
    points = np.random.default_rng(0).normal(size=(24, 30, 3))
    datasets.Dataset.from_dict({"points": points.tolist()}).to_parquet(folder / "a.parquet")
    return folder / "a.parquet"


def vectors(folder):
    rows = np.random.default_rng(0).normal(size=(64, 7)) * [1, 10, 0.1, 1, 1, 1, 5] + 3
    np.save(folder / "table.npy", rows)
    return folder / "table.npy"


def volumes(folder):
    for i in range(12):
        volume = np.random.default_rng(i).normal(size=(8, 10, 12)).cumsum(0).astype(np.float32)
        np.save(folder / f"scan {i}.npy", volume)
    return folder


def float_pictures(folder):
    pictures = np.stack([np.asarray(photograph(i)) for i in range(24)]) / np.float32(255)
    np.save(folder / "x.npy", pictures)
    return folder / "x.npy"


# No images to train on


def nothing(folder):
    return folder


def missing(folder):
    return folder / "nowhere"


def text_file(folder):
    (folder / "notes.txt").write_text("no image")
    return folder / "notes.txt"


def texts(folder):
    text_file(folder)
    return folder


def deep(folder):
    for i in range(3):
        picture = Image.fromarray(np.full((8, 8), 1000 * i, np.uint16))
        picture.save(folder / f"{i}.png")
    return folder


def animations(folder):
    frames = [photograph(i) for i in range(3)]
    for i in range(3):
        frames[0].save(folder / f"{i}.gif", save_all=True, append_images=frames[1:])
    return folder


def all_broken(folder):
    for i in range(3):
        (folder / f"{i}.jpg").write_bytes(b"\xff\xd8\xff no image")
    return folder


def uneven(folder):
    for i in range(12):
        np.save(folder / f"{i:02d}.npy", np.zeros(20 + i))
    return folder


def latents(folder):
    rows = []
    for i in range(24):
        latent = np.random.default_rng(i).normal(size=(4, 8, 8)).astype(np.float16)
        np.save(file := io.BytesIO(), latent)
        rows.append(file.getvalue())
    datasets.Dataset.from_dict({"latent": rows}).to_parquet(folder / "train.parquet")
    return folder


def on_the_hub(folder):
    return "someone/nothing"


def numbers(folder):
    datasets.Dataset.from_dict({"age": [1, 2]}).to_parquet(folder / "train.parquet")
    return folder
