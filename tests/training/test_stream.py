"""The stream: every example once an epoch, from several shards at once, exactly resumable.

Labels of the small data sets made here are the examples' numbers, so a batch tells who is in it.
"""

import itertools
import json
import multiprocessing
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from collections import Counter
from itertools import islice

import fsspec
import pytest
import torch
from image_files import (
    PARDONS,
    N,
    encode,
    labels,
    module,
    pixels,
    same,
    saved,
    serving,
    stop_workers,
    take,
    write_parquet,
    write_sixty,
)

from lit_diffusion.training.data.batching.stream import follow
from lit_diffusion.training.data.decoding.images import ImageDecoder
from lit_diffusion.training.data.decoding.split import Split
from lit_diffusion.training.data.module import DataModule
from lit_diffusion.training.data.reading import retry as network
from lit_diffusion.training.data.reading.columns import Columns
from lit_diffusion.training.data.reading.order import Position, coin, deal
from lit_diffusion.training.data.reading.sources import find_splits, open_source

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sixty(tmp_path_factory.mktemp("sixty"))


def opened(splits, open_shards=4):
    source = open_source(splits, "train", Columns("image", "label"), open_shards)
    return Split("train", source, ImageDecoder((1, 8, 8), labels=True))


# --- order


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("streaming", [True, False])
def test_each_example_once_an_epoch(folder, streaming, workers):
    data = module(folder, batch_size=6, streaming=streaming, num_workers=workers)
    loader = data.train_dataloader()
    assert len(loader) == 10
    first, second = labels(loader), labels(loader)
    assert sorted(first) == sorted(second) == list(range(N))
    assert first != second
    assert first != list(range(N))
    other = module(folder, batch_size=6, streaming=streaming, num_workers=workers, seed=1)
    assert labels(other.train_dataloader()) != first


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("window", [1, 7, 100])
def test_each_example_once_over_any_number_of_lanes(folder, streaming, window):
    splits = find_splits(str(folder), None, None, streaming)
    split = opened(splits)
    assert split.source.total == N
    for world, workers in [(1, 1), (1, 4), (2, 1), (2, 3), (3, 2), (3, 4)]:
        seen = {epoch: [] for epoch in range(3)}
        for rank in range(world):
            for worker in range(workers):
                lane = rank * workers + worker
                for item, epoch, *_ in follow(split, lane, world * workers, 0, window, Position()):
                    if epoch == 3:
                        break
                    seen[epoch].append(split.source.fetch([item])[0].label)
        assert all(sorted(epoch) == list(range(N)) for epoch in seen.values())


def test_deal_cuts_equal_parts():
    rows, order = [5, 0, 1, 7], [3, 1, 0, 2]
    for lanes in range(1, 14):
        parts = [deal(rows, order, lane, lanes) for lane in range(lanes)]
        sizes = [sum(piece.stop - piece.start for piece in part) for part in parts]
        assert sum(sizes) == 13
        assert max(sizes) - min(sizes) <= 1


def test_epochs_are_completed_from_the_next(folder):
    loader = module(folder, batch_size=7).train_dataloader()
    assert len(loader) == 8
    stream = labels(take(loader, 60))
    assert [sorted(stream[k : k + N]) for k in range(0, 420, N)] == [list(range(N))] * 7


def test_the_loader_measures_how_long_its_user_waits(folder, monkeypatch):
    loader = module(folder, batch_size=7).train_dataloader()
    batches = loader.batches
    plain = type(batches).__iter__

    def slow(self):
        for batch in plain(self):
            time.sleep(0.02)
            yield batch

    assert loader.wait_seconds == 0
    monkeypatch.setattr(type(batches), "__iter__", slow)
    for _ in loader:
        time.sleep(0.05)  # what the user does with a batch does not count
    assert 8 * 0.02 <= loader.wait_seconds < 8 * 0.05
    before = loader.wait_seconds
    for _ in loader:
        pass
    assert loader.wait_seconds >= before + 8 * 0.02


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_each_example_once_for_any_ranks_workers_shards(tmp_path, world, shards):
    """151 examples in shards of uneven length: a prime, so nothing divides anything."""
    ends = [151 * (k + 1) ** 2 // shards**2 for k in range(shards)]
    for number, (begin, end) in enumerate(itertools.pairwise([0, *ends])):
        images = [encode(image) for image in pixels(end - begin, seed=number)]
        file = tmp_path / "set" / f"train-{number:05d}-of-{shards:05d}.parquet"
        write_parquet(file, images, list(range(begin, end)), group=200)
    splits = find_splits(str(tmp_path / "set"), None, None, streaming=True)
    for workers, open_shards in itertools.product([0, 1, 2, 4], [1, 4]):
        split = opened(splits, open_shards)
        assert (split.source.shards, split.source.total) == (shards, 151)
        lanes = world * max(1, workers)
        for epoch in range(2):
            seen = []
            for lane in range(lanes):
                steps = follow(split, lane, lanes, 0, 16, Position(epoch))
                mine = [item for item, e, *_ in islice(steps, 152) if e == epoch]
                assert 151 // lanes <= len(mine) <= -(-151 // lanes)
                seen += mine
            assert sorted(example.label for example in seen) == list(range(151))
            assert sorted(example.index for example in seen) == list(range(151))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("world", "workers"), [(1, 4), (2, 2), (3, 1)])
def test_each_example_once_with_real_workers(folder, world, workers):
    """Two epochs of every rank: what its lanes' parts hold, each example once and no other."""
    seen = []
    for rank in range(world):
        data = module(folder, (rank, world), batch_size=5, num_workers=workers)
        part = N * (rank + 1) // world - N * rank // world
        assert part % 5 == 0
        seen.append(labels(take(data.train_dataloader(), 2 * part // 5)))
    counts = Counter(itertools.chain(*seen))
    assert counts == dict.fromkeys(range(N), 2)


# --- several shards at once


def shard_of(example):
    return next(end for end in (7, 14, 21, 28, 30, 37, 44, 50, 57, 60) if example.index < end)


@pytest.mark.parametrize(("open_shards", "least"), [(1, 1), (2, 2), (4, 4), (10, 6)])
def test_a_window_mixes_as_many_shards_as_are_open(folder, open_shards, least):
    splits = find_splits(str(folder), None, None, streaming=True)
    source = opened(splits, open_shards).source
    for epoch in range(5):
        windows = list(source.windows(0, 1, 0, 10, Position(epoch)))
        for window in windows[:-1]:
            assert len(window.items) == 10 // open_shards * open_shards
            assert len({shard_of(example) for example in window.items}) >= least
        alone = [len({shard_of(one) for one in w.items}) for w in windows]
        assert open_shards > 1 or max(alone) <= 3  # ten in a row touch at most three


def test_memory_holds_one_window_and_the_open_shards(tmp_path, monkeypatch):
    """However long the stream: at most so many readers, and bytes for about one window."""
    noise = torch.randint(0, 256, (3200, 4000), dtype=torch.uint8).numpy()
    write_parquet(tmp_path / "x.parquet", [bytes(row) for row in noise], group=200)
    splits = find_splits(str(tmp_path / "x.parquet"), None, None, streaming=True)
    source = open_source(splits, "train", Columns("image"))
    split = Split("train", source, ImageDecoder((1, 8, 8), labels=False))
    opened, most = [], []
    plain = type(source).batches

    def counted(*arguments):
        opened.append(arguments)
        most.append(len(opened))
        try:
            yield from plain(*arguments)
        finally:
            opened.pop()

    monkeypatch.setattr(type(source), "batches", counted)
    stream = follow(split, 0, 1, 0, 400, Position())
    tracemalloc.start()
    for _ in islice(stream, 9600):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    stream.close()
    assert max(most) == 4
    # Two windows, one of them on its way out, and what the readers turn to objects at a time.
    assert peak < 4000 * (2 * 400 + 4 * 2 * 64) * 1.5


# --- over HTTP


def urls(server, folder):
    train = [f"{server.url}/{file.name}" for file in sorted(folder.glob("train*"))]
    return {"train": train, "test": f"{server.url}/test-00000-of-00001.parquet"}


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_stream_over_http_is_the_local_stream(folder, workers):
    settings = {"num_workers": workers, "shuffle_window": 11, "horizontal_flip": True}
    local = module(folder, **settings)
    expected = take(local.train_dataloader(), 20)
    with serving(folder) as server:
        remote = module("parquet", data_files=urls(server, folder), **settings)
        loader = remote.train_dataloader()
        assert same(take(loader, 7), expected[:7])
        state = loader.state_dict()
        assert same(take(loader, 13), expected[7:])
        resumed = module("parquet", data_files=urls(server, folder), **settings)
        resumed.train_dataloader().load_state_dict(state)
        assert same(take(resumed.train_dataloader(), 13), expected[7:])
        for a, b in zip(local.val_dataloader(), remote.val_dataloader(), strict=True):
            assert torch.equal(a["image"], b["image"])


def read_all(found, source):
    found.extend(source.head(None))


def test_the_main_process_still_reads_while_workers_do(folder):
    """Forked workers that closed the connections they inherit would leave their parent waiting."""
    with serving(folder) as server:
        for _ in range(3):
            data = module("parquet", data_files=urls(server, folder), num_workers=2)
            source = data._train.source
            list(source.head(None))
            take(data.train_dataloader(), 3)
            found: list = []
            thread = threading.Thread(target=read_all, args=(found, source), daemon=True)
            thread.start()
            thread.join(timeout=20)
            assert len(found) == N
            stop_workers()


def test_connections_are_closed_before_a_fork(folder):
    with serving(folder) as server:
        module("parquet", data_files=urls(server, folder), val_split=None)
        (storage, _) = fsspec.core.url_to_fs(server.url)
        gone = weakref.ref(storage)
        del storage
        assert gone() is not None  # cached by fsspec
        network.close_connections()
        assert gone() is None


# --- workers that are not forked


def sources(folder, tmp_path, server):
    """One data set for each kind of source."""
    lines = [{"image": image.tolist(), "label": k} for k, image in enumerate(pixels(N)[:, 0])]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for k, image in enumerate(pixels(N)):
        file = tmp_path / "images" / "train" / str(k % 2) / f"{k}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image))
    return {
        "parquet": {"path": folder},
        "http": {"path": "parquet", "data_files": urls(server, folder)},
        "lines": {"path": "json", "data_files": {"train": str(tmp_path / "x.jsonl")}},
        "files": {"path": tmp_path / "images"},
        "memory": {"path": folder, "streaming": False},
    }


def test_every_source_can_be_sent_to_a_spawned_worker(folder, tmp_path):
    with serving(folder) as server:
        for name, arguments in sources(folder, tmp_path, server).items():
            batches = module(val_split=None, **arguments).train_dataloader().batches
            sent = pickle.loads(pickle.dumps(batches))
            expected, found = (list(islice(some, 9)) for some in (batches, sent))
            assert [one.position for one in found] == [one.position for one in expected], name
            assert same([one.batch for one in found], [one.batch for one in expected]), name


SPAWN = """
import multiprocessing, sys
from lit_diffusion.training import DataModule

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[2])
    data = DataModule(sys.argv[1], batch_size=8, num_workers=2, val_split=None)
    data.setup("fit")
    print([batch["label"].tolist() for batch in data.train_dataloader()])
"""


@pytest.mark.soak
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_spawned_workers_give_the_same_batches(folder, tmp_path, method):
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    words = [sys.executable, str(script), str(folder), method]
    out = subprocess.run(words, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    expected = list(module(folder, num_workers=2).train_dataloader())
    assert json.loads(out.stdout) == [batch["label"].tolist() for batch in expected]


def test_a_url_is_a_path(folder):
    with serving(folder) as server:
        data = module(f"{server.url}/train-00000-of-00003.parquet?download=true", val_split=None)
        assert sorted(labels(take(data.train_dataloader(), 15))) == sorted([*range(30)] * 4)
        with pytest.raises(ValueError, match="expected the URL of a parquet file, got"):
            module(f"{server.url}/images.tar")
        with pytest.raises(FileNotFoundError, match="cannot be opened"):
            module(f"{server.url}/nowhere.parquet")


@pytest.mark.parametrize("workers", [0, 2])
def test_dropped_connections_are_taken_up_at_the_right_row(folder, monkeypatch, workers):
    monkeypatch.setattr(network, "FIRST_WAIT", 0.01)
    settings = {"num_workers": workers, "shuffle_window": 11}
    expected = take(module(folder, **settings).train_dataloader(), 15)
    with serving(folder) as server:
        loader = module("parquet", data_files=urls(server, folder), **settings).train_dataloader()
        server.drop(4)
        assert same(take(loader, 15), expected)
        assert server.drops == 0


@pytest.mark.parametrize("on_bad_example", ["skip", "raise"])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_network_that_is_down_ends_the_run(folder, monkeypatch, workers, on_bad_example):
    monkeypatch.setattr(network, "FIRST_WAIT", 0.01)
    with serving(folder) as server:
        settings = {"data_files": urls(server, folder), "on_bad_example": on_bad_example}
        data = module("parquet", num_workers=workers, shuffle_window=11, **settings)
        take(data.train_dataloader(), 1)
    with pytest.raises(
        ConnectionError,
        match=rf"^expected to read {server.url}/train-0000\d-of-00003.parquet over the network, "
        r"got 5 failures in a row \(.*\); check the network, then resume",
    ) as caught:
        take(data.train_dataloader(), 60)
    assert "\n" not in str(caught.value)


# --- resumption


# Within an epoch, at the end of one of Lightning's, at the end of one of the data, and later.
PLACES = [(0, 5), (0, 7), (0, 15), (0, 16), (2, 5)]
PLACES += [pytest.param(2, step, marks=pytest.mark.slow) for step in (7, 15, 16)]


@pytest.mark.parametrize(("workers", "step"), PLACES)
@pytest.mark.parametrize("streaming", [True, False])
def test_resume_continues_the_same_batches(folder, streaming, workers, step):
    settings = {"streaming": streaming, "num_workers": workers}
    settings |= {"horizontal_flip": True, "shuffle_window": 11}
    loader = module(folder, **settings).train_dataloader()
    take(loader, step)
    state = torch.load(saved(loader.state_dict()), weights_only=True)
    expected = take(loader, 12)
    resumed = module(folder, **settings).train_dataloader()
    resumed.load_state_dict(state)
    assert same(take(resumed, 12), expected)
    loader.load_state_dict(state)  # and a loader in use can be set back
    assert same(take(loader, 12), expected)


def test_the_state_is_small_and_counts_what_was_delivered(folder):
    loader = module(folder, num_workers=2).train_dataloader()
    take(loader, 3)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 1000
    assert [position[2] for position in state["ranks"][0]["positions"]] == [16, 8]  # taken
    assert state["ranks"][0]["turn"] == 1


@pytest.mark.parametrize(
    "change",
    [
        {"num_workers": 1},
        {"batch_size": 4},
        {"seed": 1},
        {"streaming": False},
        {"shuffle_window": 5},
        {"open_shards": 2},
        {"on_bad_example": "raise"},
        {"horizontal_flip": True},
        {"place": (0, 2)},
        {"train_split": "test"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_resume_refuses_another_stream(folder, change):
    state = module(folder).train_dataloader().state_dict()
    other = module(folder, **change).train_dataloader()
    with pytest.raises(ValueError, match=r"cannot resume the data: .* set it back, or start"):
        other.load_state_dict(state)


def test_a_moved_folder_may_resume_and_other_data_may_not(folder, tmp_path):
    loader = module(folder).train_dataloader()
    take(loader, 3)
    state = loader.state_dict()
    (tmp_path / "moved").symlink_to(folder)
    moved = module(tmp_path / "moved").train_dataloader()
    moved.load_state_dict(state)
    assert same(take(moved, 5), take(loader, 5))
    write_parquet(tmp_path / "train.parquet", [encode(image) for image in pixels(N, seed=1)])
    other = module(tmp_path / "train.parquet", val_split=None).train_dataloader()
    with pytest.raises(ValueError, match=r"shards|checksum"):
        other.load_state_dict(state)


def test_flips_belong_to_epoch_and_example(folder):
    plain = module(folder, batch_size=6).train_dataloader()
    flipped = module(folder, batch_size=6, horizontal_flip=True).train_dataloader()
    tosses = []
    for a, b in zip(take(plain, 20), take(flipped, 20), strict=True):
        assert torch.equal(a["label"], b["label"])
        for x, y in zip(a["image"], b["image"], strict=True):
            assert torch.equal(y, x) or torch.equal(y, x.flip(-1))
            tosses.append(not torch.equal(x, y))
    assert 40 < sum(tosses) < 80
    assert tosses[:N] != tosses[N:]
    heads = coin(0, [3] * 100_000, list(range(100_000)))
    assert heads.double().mean().item() == pytest.approx(0.5, abs=0.01)
    assert torch.equal(heads[[7, 8]], coin(0, [3, 3], [7, 8]))
    assert not torch.equal(heads, coin(1, [3] * 100_000, list(range(100_000))))


def test_the_global_generators_are_left_alone(folder):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(module(folder, num_workers=2, horizontal_flip=True).train_dataloader(), 3)
    assert torch.equal(before, torch.get_rng_state())


# --- two ranks


def _rank(rank, port, path, answers):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    settings = {"batch_size": 5, "num_workers": 2, "horizontal_flip": True, "shuffle_window": 4}
    data = DataModule(path=path, **settings)
    data.setup("fit")
    loader = data.train_dataloader()
    length = len(loader)
    begun = take(loader, 3)
    state = loader.state_dict()
    expected = take(loader, 9)
    epoch = labels(begun + expected[:3])
    again = DataModule(path=path, **settings)
    again.setup("fit")
    resumed = again.train_dataloader()
    resumed.load_state_dict(state)
    exact = same(take(resumed, 9), expected)
    index = [batch["index"].tolist() for batch in data.val_dataloader()]
    answers.put((rank, length, epoch, exact, json.dumps(state), index))
    torch.distributed.destroy_process_group()


def test_two_ranks_share_the_data_and_resume(folder):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        context.Process(target=_rank, args=(rank, port, str(folder), answers)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    (_, *first), (_, *second) = sorted(answers.get(timeout=120) for _ in ranks)
    for rank in ranks:
        rank.join(timeout=30)
    assert first[0] == second[0] == 6
    assert sorted(first[1] + second[1]) == list(range(N))
    assert first[2]
    assert second[2]
    assert first[3] == second[3]  # every rank saves the same, whole state
    state = json.loads(first[3])
    assert len(state["ranks"]) == 2
    assert state["ranks"][0] != state["ranks"][1]
    assert first[4] == [[0, 1, 2, 3, 4]]
    assert second[4] == [[5, 6, 7, 8, 9]]
