"""Arrays of numpy as a data set: one array of all examples, several, or a file for each."""

import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lit_diffusion.training import DataModule
from lit_diffusion.training.data.reading.class_names import class_names
from lit_diffusion.training.data.reading.columns import Columns
from lit_diffusion.training.data.reading.sources import find_splits, open_source

RNG = np.random.default_rng(0)
PICTURES = RNG.integers(0, 256, (20, 3, 5, 6), dtype=np.uint8)
FLOATS = RNG.normal(size=(20, 3, 5, 6)).astype(np.float32)


def batches(split="train", **arguments):
    data = DataModule(**{"label_key": None, "shape": (3, 5, 6), "val_split": None} | arguments)
    parts = list(data.examples(split, 7))
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0] if key != "batch"}


@pytest.mark.parametrize(
    "stored", [PICTURES, PICTURES.astype(">i8"), FLOATS, FLOATS.astype(">f8")]
)
@pytest.mark.parametrize("axes", [(0, 1, 2, 3), (0, 2, 3, 1)], ids=["first", "last"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_an_array_is_read_as_it_is(stored, axes, order, tmp_path):
    np.save(tmp_path / "x.npy", np.asarray(stored.transpose(axes), order=order))
    found = batches(path=str(tmp_path / "x.npy"))["image"]
    assert torch.equal(found, torch.from_numpy(stored.astype(found.numpy().dtype)))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("names", [("images", "y"), ("arr_0", "arr_1"), ("faces", "labels")])
def test_labels_come_from_the_same_file(save, names, tmp_path):
    save(tmp_path / "x.npz", **dict(zip(names, (PICTURES, np.arange(20)[:, None]), strict=True)))
    found = batches(path=str(tmp_path / "x.npz"), label_key="label")
    assert torch.equal(found["image"], torch.from_numpy(PICTURES))
    assert found["label"].tolist() == list(range(20))


@pytest.mark.parametrize(
    "names",
    [
        ("x_train", "y_train", "x_test", "y_test"),
        ("train_images", "train_labels", "test_images", "test_labels"),
    ],
)
@pytest.mark.parametrize("folder", [False, True])
def test_splits_come_from_the_names_of_arrays(names, folder, tmp_path):
    arrays = dict(zip(names, (PICTURES, np.arange(20), PICTURES[:4], np.arange(4)), strict=True))
    if folder:
        for name, array in arrays.items():
            np.save(tmp_path / f"{name}.npy", array)
    else:
        np.savez(tmp_path / "x.npz", **arrays)
    path = str(tmp_path if folder else tmp_path / "x.npz")
    assert batches(path=path, label_key="label")["label"].tolist() == list(range(20))
    assert batches("test", path=path, label_key="label")["label"].tolist() == [0, 1, 2, 3]


def test_conditions_are_arrays_of_their_own(tmp_path):
    np.savez(tmp_path / "x.npz", data=PICTURES, size=FLOATS[:, 0, 0])
    found = batches(path=str(tmp_path / "x.npz"), condition_keys=("size",))
    assert torch.equal(found["size"], torch.from_numpy(FLOATS[:, 0, 0]))


def one_file_each(folder):
    for k in range(20):
        place = folder / ("train" if k < 16 else "val") / ("cat" if k % 2 else "größer, ein Hund")
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{k:02d}.npy", PICTURES[k])


def test_a_file_for_each_example_has_the_class_of_its_folder(tmp_path):
    one_file_each(tmp_path)
    arguments = {"path": str(tmp_path), "label_key": "label"}
    found = batches(**arguments)
    order = [*range(1, 16, 2), *range(0, 16, 2)]
    assert torch.equal(found["image"], torch.from_numpy(PICTURES[order]))
    assert found["label"].tolist() == [0] * 8 + [1] * 8
    assert batches("validation", **arguments)["label"].tolist() == [0, 0, 1, 1]
    data = DataModule(**arguments, shape=(3, 5, 6), val_split="validation")
    assert class_names(data) == ["cat", "größer, ein Hund"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["npy", "npz", "folder"])
def test_training_and_held_out_examples_come_from_arrays(kind, streaming, tmp_path):
    (tmp_path / "x").mkdir()
    if kind == "folder":
        one_file_each(tmp_path / "x")
    elif kind == "npy":
        np.save(tmp_path / "x.npy", PICTURES)
    else:
        np.savez_compressed(tmp_path / "x.npz", PICTURES)
    data = DataModule(
        str(tmp_path / ("x" if kind == "folder" else f"x.{kind}")),
        shape=(3, 5, 6),
        label_key=None,
        val_share=0.4,
        batch_size=4,
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    data.setup("fit")
    seen = torch.cat([batch["image"] for batch in data.train_dataloader()])
    held_out = torch.cat([batch["image"] for batch in data.val_dataloader()])
    data.teardown("fit")
    both = torch.cat([seen, held_out]).flatten(1).tolist()
    stored = [one.flatten().tolist() for one in PICTURES]
    assert all(one in stored for one in both)
    apart = {tuple(one) for one in seen.flatten(1).tolist()}
    assert apart.isdisjoint({tuple(one) for one in held_out.flatten(1).tolist()})
    assert len(held_out)


def test_a_changed_label_changes_the_content(tmp_path):
    big = np.zeros((40, 2**21), np.uint8)  # more than is read for a digest
    np.savez(tmp_path / "x.npz", images=big, y=np.zeros(40, np.int64))

    def fingerprint():
        splits = find_splits(str(tmp_path / "x.npz"), None, None, streaming=True)
        return open_source(splits, "train", Columns("image", "label")).fingerprint

    first = fingerprint()
    assert fingerprint() == first
    labels = np.zeros(40, np.int64)
    labels[17] = 1
    np.savez(tmp_path / "x.npz", images=big, y=labels)
    assert fingerprint() != first


def test_a_table_is_pickled_without_its_values(tmp_path):
    np.save(tmp_path / "x.npy", PICTURES)
    table = find_splits(str(tmp_path / "x.npy"), None, None, True)["train"].select([3, 5])
    assert (table[:]["image"] == PICTURES[[3, 5]]).all()
    data = pickle.dumps(table)
    assert len(data) < 1000
    assert (pickle.loads(data)[1]["image"] == PICTURES[5]).all()


def not_finite(folder):
    broken = FLOATS.copy()
    broken[3, 0, 0, 0] = np.nan
    np.save(folder / "x.npy", broken)
    return "finite numbers, got NaN"


def objects(folder):
    np.save(folder / "x.npy", np.array([{}, None], dtype=object), allow_pickle=True)
    return "expected an array of numbers in .*x.npy, got object"


def structured(folder):
    np.save(folder / "x.npy", np.zeros(3, [("a", "f4"), ("b", "i4")]))
    return "expected an array of numbers"


def a_number(folder):
    np.save(folder / "x.npy", np.float32(3))
    return "got a single number"


def cut_short(folder):
    np.save(folder / "y.npy", PICTURES)
    (folder / "x.npy").write_bytes((folder / "y.npy").read_bytes()[:-100])
    (folder / "y.npy").unlink()
    return "expected a whole array in .*x.npy, got 1,700 bytes"


def no_archive(folder):
    (folder / "x.npz").write_bytes(b"rubbish")
    return "x.npz cannot be opened: File is not a zip file"


def no_arrays(folder):
    with zipfile.ZipFile(folder / "x.npz", "w") as archive:
        archive.writestr("notes.txt", "nothing")
    return "expected arrays in .*, got none"


def uneven(folder):
    np.savez(folder / "x.npz", x=PICTURES, y=np.arange(19))
    return r"expected arrays of one length in split 'train' .*, got image 20, label 19"


def empty(folder):
    np.save(folder / "x.npy", PICTURES[:0])
    return "expected examples in split 'train', got none"


def no_image(folder):
    np.savez(folder / "x.npz", a=PICTURES, b=FLOATS)
    return r"expected a column 'image' in split 'train', got a, b; set data.image_key"


def archives(folder):
    for k in range(3):
        np.savez(folder / f"{k}.npz", PICTURES[k])
    return "expected one .npz file in .* got 3 files, such as '0.npz'"


@pytest.mark.parametrize(
    "broken",
    [
        objects,
        structured,
        a_number,
        cut_short,
        no_archive,
        no_arrays,
        uneven,
        empty,
        no_image,
        archives,
    ],
    ids=lambda one: one.__name__,
)
def test_what_cannot_be_read_is_one_sentence(broken, tmp_path):
    with pytest.raises(ValueError, match=broken(tmp_path)) as error:
        batches(path=str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.filterwarnings("ignore:skipped")
def test_numbers_that_are_not_finite_are_bad_examples(tmp_path):
    reason = not_finite(tmp_path)
    path = str(tmp_path / "x.npy")
    assert len(batches(path=path)["image"]) == 19
    with pytest.raises(ValueError, match=reason):
        batches(path=path, on_bad_example="raise")


def test_images_beside_arrays_are_what_is_read(tmp_path):
    np.save(tmp_path / "a.npy", PICTURES)
    Image.fromarray(PICTURES[0].transpose(1, 2, 0)).save(tmp_path / "b.png")
    assert len(batches(path=str(tmp_path))["image"]) == 1
