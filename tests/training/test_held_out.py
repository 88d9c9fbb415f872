"""A split of one's own: each example is on one side, in whatever way the data are read."""

import json
import shutil

import datasets
import numpy as np
import pytest
from image_files import PARDONS, encode, module, pixels, stop_workers, take, write_parquet

from lit_diffusion.training.data.reading.held_out import HELD_OUT

pytestmark = [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]

N, SHARE = 80, 0.25


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    stop_workers()


def write_folder(folder, numbers=range(N)):
    """Images in folders by class, each of one grey value: its number."""
    for number in numbers:
        place = folder / "train" / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        array = np.full((1, 8, 8), number, np.uint8)
        (place / f"image{number:03d}.png").write_bytes(encode(array))
    return folder


def write_files(folder, kinds=(0, 1)):
    images = [encode(np.full((1, 8, 8), number, np.uint8)) for number in range(N)]
    for kind in kinds:
        part = images[40 * kind : 40 * kind + 40]
        write_parquet(folder / f"train-{kind:05d}-of-{len(kinds):05d}.parquet", part)
    return folder


def write_lines(folder):
    folder.mkdir()
    rows = [{"image": [[number] * 8] * 8, "label": number} for number in range(N)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


WRITE = {"folder": write_folder, "parquet": write_files, "lines": write_lines}


def values(batches):
    """The number of each example is its grey value."""
    return sorted(int(one) for batch in batches for one in batch["image"][:, 0, 0, 0])


def parts(path, places=((0, 1),), **arguments):
    """What is trained on in an epoch, and what is validated on, over all ranks."""
    train, val = [], []
    for place in places:
        data = module(path, place=place, batch_size=2, val_share=SHARE, **arguments)
        val += values(data.val_dataloader())
        lane = data._train.source.total
        begin, end = (lane * (place[0] + k) // place[1] for k in (0, 1)) if lane else (0, 0)
        batches = take(data.train_dataloader(), (end - begin + 1) // 2 if lane else 200)
        train += values(batches)[:] if not lane else []
        if lane:
            found = [int(v) for batch in batches for v in batch["image"][:, 0, 0, 0]]
            train += found[: end - begin]
    return sorted(train), sorted(val)


@pytest.mark.parametrize("kind", WRITE)
def test_each_example_is_on_one_side_however_it_is_read(tmp_path, kind):
    path = WRITE[kind](tmp_path / "data")
    found = {}
    for name, arguments in {
        "streamed": {},
        "on two ranks": {"places": ((0, 2), (1, 2))},
        "in memory": {"streaming": False},
        "in memory, on two ranks": {"streaming": False, "places": ((0, 2), (1, 2))},
        "by workers": {"num_workers": 1},
    }.items():
        if kind == "lines" and "ranks" in name and "memory" not in name:
            continue  # of unknown length: endless, without epochs
        train, val = parts(path, **arguments)
        assert set(train).isdisjoint(val), name
        assert sorted({*train} | {*val}) == list(range(N)), name
        assert len(val) == len(set(val)), name
        if not (kind == "lines" and "memory" not in name):
            assert len(train) == len(set(train)), name
        found[name] = val
    assert all(val == found["streamed"] for val in found.values())
    assert 0.1 * N < len(found["streamed"]) < 0.4 * N


def test_images_keep_their_side_when_others_come_and_go_or_all_move(tmp_path):
    whole = parts(write_folder(tmp_path / "one"))[1]
    fewer = parts(write_folder(tmp_path / "two", range(5, N - 20)))[1]
    assert fewer == [number for number in whole if 5 <= number < N - 20]
    shutil.copytree(tmp_path / "one", tmp_path / "elsewhere" / "three")
    assert parts(tmp_path / "elsewhere" / "three")[1] == whole


def test_rows_keep_their_side_when_a_file_is_added(tmp_path):
    both = parts(write_files(tmp_path / "both"))[1]
    images = [encode(np.full((1, 8, 8), number, np.uint8)) for number in range(40)]
    write_parquet(tmp_path / "one" / "train-00000-of-00001.parquet", images)
    assert parts(tmp_path / "one")[1] == [number for number in both if number < 40]


def test_a_bad_example_is_named_by_its_row_in_the_file(tmp_path):
    images = [encode(image) for image in pixels(N)]
    write_parquet(tmp_path / "d" / "train.parquet", images)
    held = {}
    for name in ("train", HELD_OUT):
        source = module(tmp_path / "d", val_share=SHARE).open_split(name).source
        rows = [source.where(example.index)[1] for example in source.head(None)]
        assert [one.label for one in source.head(None)] == rows
        held[name] = rows
    assert sorted(held["train"] + held[HELD_OUT]) == list(range(N))


def test_references_and_statistics_leave_the_share_out_as_well(tmp_path):
    data = module(write_folder(tmp_path / "data"), val_share=SHARE)
    train, val = (values(data.examples(split, 16)) for split in ("train", HELD_OUT))
    assert val == values(data.val_dataloader())
    assert sorted(train + val) == list(range(N))
    prints = {data.open_split(split).source.fingerprint for split in ("train", HELD_OUT)}
    prints.add(module(data.path, val_split=None).open_split("train").source.fingerprint)
    assert len(prints) == 3


def test_resuming_with_another_share_is_refused(tmp_path):
    path = write_folder(tmp_path / "data")
    state = module(path, val_share=0.25).train_dataloader().state_dict()
    with pytest.raises(ValueError, match=r"data\.val_share was 0\.25"):
        module(path, val_share=0.3).train_dataloader().load_state_dict(state)


def test_a_folder_without_a_test_split_trains_and_says_what_is_missing(tmp_path):
    path = write_folder(tmp_path / "data")
    with pytest.warns(UserWarning, match=r"no split 'test'.*set data\.val_share to 0\.1"):
        data = module(path)
    assert list(data.val_dataloader()) == []
    assert len(take(data.train_dataloader(), 2)) == 2
    with pytest.raises(ValueError, match="expected a split 'validation', got train"):
        module(path, val_split="validation")
    with pytest.raises(ValueError, match=r"for a part of a split set data\.val_share"):
        module(path, val_split="train[:10%]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"val_share": 0.0}, "between 0 and 1"),
        ({"val_share": 1.0}, "between 0 and 1"),
        ({"val_share": 0.1, "val_split": "validation"}, "set one of them to null"),
        ({"val_share": 1e-9}, "none held out of 80"),
    ],
)
def test_a_share_that_makes_no_sense_is_one_line(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        module(write_folder(tmp_path / "data"), **arguments)
