"""Data in memory: decoded once, whole or not at all, and every example once an epoch.

Labels of the small data sets made here are the examples' numbers, so a batch tells who is in it.
"""

import errno
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lit_diffusion.training.data.batching import map_writer, memory
from lit_diffusion.training.data.batching.memory import MemoryBatches, MemoryMap
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading import bad_examples
from lit_diffusion.training.data.reading.bad_examples import BadExample
from lit_diffusion.training.data.reading.order import Position, coin
from lit_diffusion.training.run import whole_folder

N = 60
FORK = multiprocessing.get_context("fork")

pytestmark = pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision:DeprecationWarning"
)


def pixels(n=N, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)


def encode(image):
    file = io.BytesIO()
    Image.fromarray(image[0]).save(file, "PNG")
    return file.getvalue()


def write_parquet(path, images, **columns):
    names = ["image"] + [name for name in columns if name != "label"]
    table = {"image": images, "label": list(range(len(images)))} | columns
    for name in names:
        table[name] = [{"bytes": image, "path": None} for image in table[name]]
    table = datasets.Dataset.from_dict(table)
    for name in names:
        table = table.cast_column(name, datasets.Image(decode=False))
    for name in names:
        table = table.cast_column(name, datasets.Image())
    table.to_parquet(path, batch_size=7)
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Sixty images in one file, in two columns, with their numbers for labels."""
    folder = tmp_path_factory.mktemp("sixty")
    images = [encode(image) for image in pixels()]
    return write_parquet(folder / "train.parquet", images, other=images[::-1])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The folder of maps, empty for each test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "lit_diffusion"


def module(path, place=(0, 1), **arguments):
    settings = {"batch_size": 6, "streaming": False, "val_split": None} | arguments
    data = DataModule(path=str(path), **settings)
    data._place = lambda: place
    data.setup("fit")
    return data


def open_map(path, **arguments):
    return module(path, **arguments)._memory


def take(loader, n):
    batches = []
    while len(batches) < n:
        batches += islice(iter(loader), n - len(batches))
    return batches


def same(batches, others):
    return len(batches) == len(others) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(batches, others, strict=True)
    )


def indices(batches):
    return torch.cat([batch["index"] for batch in batches]).tolist()


def names(cache):
    """What lies in the cache: names of maps, and how many unfinished ones."""
    found = [path.name for path in cache.iterdir() if path.is_dir()] if cache.exists() else []
    return [x for x in found if "." not in x], len([x for x in found if x.endswith(".tmp")])


def assert_whole(found):
    assert torch.equal(found.images[0], torch.from_numpy(pixels()))
    assert found.labels.tolist() == found.rows.tolist() == list(range(N))


# --- the content


def test_the_map_holds_what_streaming_decodes(file, cache):
    found = open_map(file)
    assert_whole(found)
    streamed = module(file, streaming=True)._train
    batch = streamed.batch(list(streamed.source.head(None)))
    assert torch.equal(found.images[0], batch["image"])
    assert torch.equal(found.labels, batch["label"])
    arrays = {path.name: np.load(path) for path in found.folder.glob("*.npy")}
    assert arrays.keys() == {"images.npy", "labels.npy", "rows.npy"}  # for anybody to load
    assert np.array_equal(arrays["images.npy"], pixels())


@pytest.mark.parametrize("chunk", [1, 7, 60])
def test_chunks_do_not_matter(file, monkeypatch, chunk):
    monkeypatch.setattr(map_writer, "CHUNK_EXAMPLES", chunk)
    assert_whole(open_map(file))


def test_batches(file):
    (batch,) = take(module(file).train_dataloader(), 1)
    assert list(batch) == ["image", "label", "index"]
    assert batch["image"].shape == (6, 1, 8, 8)
    assert [batch[key].dtype for key in batch] == [torch.uint8, torch.int64, torch.int64]
    assert torch.equal(batch["image"], torch.from_numpy(pixels()[batch["index"].numpy()]))
    assert torch.equal(batch["label"], batch["index"])
    (batch,) = take(module(file, label_key=None).train_dataloader(), 1)
    assert list(batch) == ["image", "index"]


def test_a_batch_is_a_copy(file):
    loader = module(file).train_dataloader()
    for batch in take(loader, 10):
        for entry in batch.values():
            entry.zero_()
    assert_whole(loader.batches.memory)


def test_a_map_travels_by_name(file):
    found = open_map(file)
    sent = pickle.dumps(found)
    assert len(sent) < 1000
    assert_whole(pickle.loads(sent))


# --- the name


def test_the_name_changes_with_what_decides_the_bytes(file, cache, tmp_path):
    for change in ({}, {"label_key": None}, {"image_key": "other"}):
        open_map(file, **change)
    assert len(names(cache)[0]) == 3
    copy = write_parquet(tmp_path / "copy.parquet", [encode(image) for image in pixels()])
    first = open_map(copy)
    stat = copy.stat()
    write_parquet(copy, [encode(image) for image in pixels(seed=1)])
    os.utime(copy, (stat.st_atime, stat.st_mtime + 1))  # however coarse the clock
    second = open_map(copy)
    assert first.folder != second.folder
    assert torch.equal(second.images[0], torch.from_numpy(pixels(seed=1)))
    folders = [tmp_path / "set" / split for split in ("train", "test")]
    for folder in folders:
        folder.mkdir(parents=True)
        for number, image in enumerate(pixels(4)):
            (folder / f"{number}.png").write_bytes(encode(image))
    settings = {"path": tmp_path / "set", "label_key": None}
    assert open_map(**settings).folder != open_map(**settings, train_split="test").folder
    first = open_map(**settings)
    changed = folders[0] / "2.png"
    stat = changed.stat()
    changed.write_bytes(encode(pixels(seed=5)[0]))
    os.utime(changed, (stat.st_atime, stat.st_mtime + 1))
    second = open_map(**settings)
    assert first.folder != second.folder
    assert torch.equal(second.images[0][2], torch.from_numpy(pixels(seed=5)[0]))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("fingerprint", "b"),
        ("shape", (1, 8, 9)),
        ("image_key", "b"),
        ("label_key", "b"),
        ("label_key", None),
    ],
)
def test_each_part_of_the_identity_counts(file, tmp_path, key, value):
    identity = {"format": 1, "fingerprint": "a", "shape": (1, 8, 8)}
    identity |= {"image_key": "a", "label_key": "a"}
    decode = module(file, streaming=True)._train
    first = memory.open_map(decode, identity, tmp_path / "maps")
    assert memory.open_map(decode, identity, tmp_path / "maps").folder == first.folder
    other = memory.open_map(decode, identity | {key: value}, tmp_path / "maps")
    assert other.folder != first.folder


@pytest.mark.slow
def test_the_name_does_not_change_with_anything_else(file, cache):
    others = {"batch_size": 7, "seed": 3, "horizontal_flip": True, "num_workers": 1}
    others |= {"shuffle_window": 3, "steps_per_epoch": 2, "val_split": "train", "val_examples": 5}
    folders = {open_map(file, **{name: value}).folder for name, value in others.items()}
    assert len(folders) == len(names(cache)[0]) == 1
    code = (
        "import sys; from lit_diffusion.training.data.module import DataModule\n"
        "d = DataModule(path=sys.argv[1], streaming=False, val_split=None)\n"
        "d.setup('fit'); print(d._memory.folder.name)"
    )
    for seed in ("1", "2"):
        environment = os.environ | {"HF_DATASETS_CACHE": str(cache.parent), "PYTHONHASHSEED": seed}
        out = subprocess.run(
            [sys.executable, "-c", code, str(file)],
            env=environment,
            text=True,
            capture_output=True,
        )
        assert out.stdout.split() == [folder.name for folder in folders], out.stderr
    assert len(names(cache)[0]) == 1


def test_the_place_can_be_chosen(file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_map(file, cache_dir=str(tmp_path / "maps")).folder.parent == tmp_path / "maps"
    assert open_map(file, cache_dir="~/mine").folder.parent == tmp_path / "mine"
    assert memory.cache_folder() == tmp_path / "cache" / "lit_diffusion"


# --- whole or not at all


def test_a_map_is_found_and_not_made_again(file, monkeypatch):
    folder = open_map(file).folder

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(map_writer, "write_map", never)
    assert open_map(file).folder == folder


def _slowly(monkeypatch, moment=lambda done: None):
    """Decode seven at a time; `moment` is told how often."""
    done = []
    decode = Split.decode

    def slow(self, examples):
        if len(examples) > 1:  # setup looks at one
            done.append(len(examples))
            moment(len(done))
        return decode(self, examples)

    monkeypatch.setattr(map_writer, "CHUNK_EXAMPLES", 7)
    monkeypatch.setattr(Split, "decode", slow)


def test_many_start_at_once_and_one_decodes(file, cache, tmp_path, monkeypatch):
    open_map(file, cache_dir=str(tmp_path / "before"))  # the data set itself is prepared
    log, start = tmp_path / "log", FORK.Event()

    def note(done):
        with log.open("a") as lines:
            lines.write(f"{os.getpid()}\n")
        time.sleep(0.02)

    def run(answers):
        start.wait()
        answers.put(open_map(file).images[0].numpy().tobytes())

    _slowly(monkeypatch, note)
    answers = FORK.Queue()
    runs = [FORK.Process(target=run, args=(answers,)) for _ in range(3)]
    for process in runs:
        process.start()
    start.set()
    assert {answers.get(timeout=60) for _ in runs} == {pixels().tobytes()}
    for process in runs:
        process.join(timeout=30)
    pids = log.read_text().split()
    assert len(pids) == 9
    assert len(set(pids)) == 1
    assert [len(names(cache)[0]), names(cache)[1]] == [1, 0]


@pytest.mark.parametrize("moment", ["decoding", "almost done"])
def test_a_killed_builder_leaves_nothing_that_counts(file, cache, monkeypatch, moment):
    reached = FORK.Event()

    def stop(*_):
        reached.set()
        time.sleep(60)

    def killed():
        if moment == "decoding":
            _slowly(monkeypatch, lambda done: stop() if done == 5 else None)
        else:
            whole_folder.sync = stop
        open_map(file)

    process = FORK.Process(target=killed)
    process.start()
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=30)
    assert names(cache) == ([], 1)
    assert_whole(open_map(file))
    assert [len(names(cache)[0]), names(cache)[1]] == [1, 0]


def test_who_waits_takes_over_from_a_killed_builder(file, cache, monkeypatch):
    reached = FORK.Event()

    def killed():
        _slowly(monkeypatch, lambda done: (reached.set(), time.sleep(60)))
        open_map(file)

    def waiting(answers):
        answers.put(open_map(file).rows.tolist())

    builder, answers = FORK.Process(target=killed), FORK.Queue()
    builder.start()
    assert reached.wait(60)
    waiter = FORK.Process(target=waiting, args=(answers,))
    waiter.start()
    time.sleep(0.5)
    assert answers.empty()
    os.kill(builder.pid, signal.SIGKILL)
    assert answers.get(timeout=60) == list(range(N))
    waiter.join(timeout=30)
    builder.join(timeout=30)


def _full(monkeypatch):
    write, written = map_writer.write, []

    def failing(file, array):
        written.append(1)
        if len(written) > 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(file, array)

    monkeypatch.setattr(map_writer, "CHUNK_EXAMPLES", 7)
    monkeypatch.setattr(map_writer, "write", failing)
    return "No space left on device"


def _little_room(monkeypatch):
    usage = shutil.disk_usage("/")._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    return "100 bytes of free space and not 4,800"


def _quota(monkeypatch):
    """The kernel's own limit, in earnest; the test of ours that comes nearest to a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    build = map_writer.write_map

    def limited(*arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            build(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(map_writer, "write_map", limited)
    return "File too large"


@pytest.mark.parametrize("trouble", [_full, _little_room, _quota])
def test_a_full_disk_leaves_nothing(file, cache, monkeypatch, trouble):
    with monkeypatch.context() as patch:
        reason = trouble(patch)
        with pytest.raises(OSError, match=rf"expected to write .*got {reason}; make") as caught:
            open_map(file)
    assert str(caught.value).count("\n") == 0
    assert "data.cache_dir" in str(caught.value)
    assert names(cache) == ([], 0)
    assert_whole(open_map(file))


def test_a_folder_that_cannot_be_written(file, tmp_path):
    (tmp_path / "closed").write_text("a file, not a folder")
    with pytest.raises(
        OSError, match=r"expected to write .*got Not a directory; .*data.cache_dir"
    ):
        open_map(file, cache_dir=str(tmp_path / "closed" / "maps"))


def test_an_image_that_does_not_fit_leaves_nothing(tmp_path, cache):
    images = [encode(image) for image in pixels(20)]
    path = write_parquet(tmp_path / "x.parquet", [*images, b"not an image"])
    with pytest.raises(ValueError, match=r"^example 20, split 'train': expected an image that"):
        open_map(path, on_bad_example="raise")
    assert names(cache) == ([], 0)


@pytest.fixture
def flawed(tmp_path):
    """Twenty images, of which numbers 3 and 11 cannot be decoded and 12 has no label."""
    images = [encode(image) for image in pixels(20)]
    images[3] = images[11] = b"not an image"
    numbers = [None if number == 12 else number for number in range(20)]
    return write_parquet(tmp_path / "flawed.parquet", images, label=numbers)


def test_bad_examples_are_left_out_and_told_each_time(flawed):
    good = [number for number in range(20) if number not in (3, 11, 12)]
    for _ in ("made", "found"):
        with pytest.warns(UserWarning, match=r"skipped example \d+, split 'train'") as caught:
            data = module(flawed, batch_size=17, horizontal_flip=True)
        found = data._memory
        assert [w.category for w in caught].count(UserWarning) == len(found.bad) == 3
        assert len(found) == 17
        assert found.rows.tolist() == found.labels.tolist() == good
        assert torch.equal(found.images[0], torch.from_numpy(pixels(20)[good]))
        assert len(data.train_dataloader()) == 1
        for epoch, batch in enumerate(take(data.train_dataloader(), 3)):
            index = batch["index"]
            assert sorted(index.tolist()) == good
            assert torch.equal(batch["label"], index)
            plain = torch.from_numpy(pixels(20))[index]
            mirrored = coin(0, [epoch] * 17, index.tolist())[:, None, None, None]
            assert torch.equal(batch["image"], plain.flip(-1).where(mirrored, plain))
    module(flawed, place=(1, 2))  # tells nothing, for rank 0 does
    # And the same map is refused where nothing may be left out.
    with pytest.raises(BadExample, match=r"^example 3, split 'train': "):
        module(flawed, on_bad_example="raise")


@pytest.mark.filterwarnings("ignore:skipped")
def test_too_many_bad_examples_leave_nothing(flawed, cache, monkeypatch):
    monkeypatch.setattr(bad_examples, "ENOUGH", 2)
    monkeypatch.setattr(map_writer, "CHUNK_EXAMPLES", 5)
    with pytest.raises(
        ValueError, match=r"got 3 of the 15 examples read .*; the first: example 3"
    ):
        open_map(flawed, max_bad_share=0.14)
    assert names(cache) == ([], 0)
    assert len(open_map(flawed, max_bad_share=0.2)) == 17
    with pytest.raises(ValueError, match=r"got 3 of the 20 examples read"):
        open_map(flawed, max_bad_share=0.14)


@pytest.mark.parametrize("name", ["images.npy", "rows.npy", "labels.npy"])
def test_a_damaged_map_is_refused(file, name):
    path = open_map(file).folder / name
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"can be read in .*, got: .*; remove that") as caught:
        open_map(file)
    assert str(path.parent) in str(caught.value)


def test_what_takes_long_is_logged(file, monkeypatch, caplog):
    caplog.set_level("INFO", "lit_diffusion")
    open_map(file)
    assert caplog.messages == []
    monkeypatch.setattr(map_writer, "PATIENCE", 0.0)
    monkeypatch.setattr(map_writer, "CHUNK_EXAMPLES", 40)
    open_map(file, label_key=None)
    assert caplog.messages == [
        f"decoding split 'train', once: {n} of 60 examples" for n in (40, 60)
    ]


# --- the order


def test_each_example_once_an_epoch_on_any_number_of_lanes(file):
    found = open_map(file)
    for lanes in (1, 2, 3, 4, 6, 7, 13):
        for batch_size in (1, 4, 7, 64):
            batches = MemoryBatches(found, batch_size, 0, False, rank=0, world=1)
            epochs = [[], [], []]
            for lane in range(lanes):
                batches.begin_at([Position()] * lanes, lane)
                part = N * (lane + 1) // lanes - N * lane // lanes
                steps = -(-3 * part // batch_size)
                stream = indices(batch for batch, *_ in islice(batches, steps))
                for epoch in range(3):
                    epochs[epoch] += stream[epoch * part : (epoch + 1) * part]
            assert all(sorted(epoch) == list(range(N)) for epoch in epochs)
            assert epochs[0] != epochs[1]
            assert epochs[0] != list(range(N))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_example_once_over_ranks_and_workers(file, world, workers):
    settings = {"batch_size": 5, "num_workers": workers}
    loaders = [module(file, (rank, world), **settings).train_dataloader() for rank in range(world)]
    assert {len(loader) for loader in loaders} == {N // 5 // world}
    epochs = [[index for loader in loaders for index in indices(loader)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(N))
    assert epochs[0] != epochs[1]


def test_the_order_belongs_to_the_seed_and_not_to_the_map(file, tmp_path):
    built = take(module(file, seed=3).train_dataloader(), 25)
    found = take(module(file, seed=3).train_dataloader(), 25)
    elsewhere = module(file, seed=3, cache_dir=str(tmp_path / "maps")).train_dataloader()
    assert same(built, found)
    assert same(built, take(elsewhere, 25))
    assert not same(built, take(module(file, seed=4).train_dataloader(), 25))


@pytest.mark.parametrize(("workers", "steps"), [(0, range(26)), (1, (3,)), (2, (1, 9))])
def test_resume_at_any_batch(file, workers, steps):
    settings = {"batch_size": 7, "num_workers": workers, "horizontal_flip": True}
    whole = module(file, **settings).train_dataloader()
    batches = take(whole, max(steps) + 12)
    for step in steps:
        loader = module(file, **settings).train_dataloader()
        take(loader, step)
        state = loader.state_dict()
        assert len(json.dumps(state)) < 1000
        resumed = module(file, **settings).train_dataloader()
        resumed.load_state_dict(state)
        assert same(take(resumed, 12), batches[step : step + 12])


def test_too_many_lanes(file):
    with pytest.raises(ValueError, match="at least one example for each of 31 ranks × 2 workers"):
        module(file, (0, 31), num_workers=2).train_dataloader()


def test_flips_are_those_of_streaming(file):
    """By (seed, epoch, index): the orders differ, the images do not."""
    seen = []
    for streaming in (True, False):
        loader = module(file, streaming=streaming, horizontal_flip=True, seed=5).train_dataloader()
        batches = take(loader, 30)
        seen.append(
            {
                (step // 10, label.item()): image
                for step, batch in enumerate(batches)
                for label, image in zip(batch["label"], batch["image"], strict=True)
            }
        )
    streamed, mapped = seen
    assert streamed.keys() == mapped.keys()
    assert len(mapped) == 3 * N
    assert all(torch.equal(mapped[key], streamed[key]) for key in mapped)
    plain = torch.from_numpy(pixels())
    mirrored = [not torch.equal(image, plain[index]) for (_, index), image in mapped.items()]
    assert 60 < sum(mirrored) < 120


def test_the_map_is_no_copy_in_memory(file):
    """Ranks of a machine share pages: what is mapped is the file itself."""
    found = open_map(file)
    assert isinstance(found, MemoryMap)
    with (found.folder / "images.npy").open("r+b") as images:
        images.seek(-1, io.SEEK_END)
        last = images.read(1)[0]
        images.seek(-1, io.SEEK_END)
        images.write(bytes([last ^ 1]))
        images.flush()
    assert found.images[0][-1, -1, -1, -1].item() == last ^ 1
