"""Buckets: every picture in the size nearest to it, each once a pass, one size a batch."""

import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from image_files import PARDONS, module, stop_workers, write_parquet
from image_folders import photograph, save

from lit_diffusion import DiT, FourierFeatures, UNet
from lit_diffusion.nn import ResidualMLP
from lit_diffusion.training import EMA, LitDiffusion, SampleGrid
from lit_diffusion.training.callbacks.throughput import count_flops
from lit_diffusion.training.data import DataModule
from lit_diffusion.training.data.batching.buckets import BucketOrder
from lit_diffusion.training.data.batching.validation import divided_by_shape
from lit_diffusion.training.data.decoding.buckets import Buckets
from lit_diffusion.training.data.decoding.transforms import Fit
from lit_diffusion.training.data.reading.bad_examples import BadExample
from lit_diffusion.training.data.reading.order import coin
from lit_diffusion.training.run.checkpoints import load_checkpoint

pytestmark = [pytest.mark.filterwarnings(text) for text in PARDONS]

SIZES = [(20, 20), (30, 20), (18, 29), (41, 40), (22, 40), (60, 20), (26, 25)]  # (width, height)
BUCKETS = [[8, 8], [6, 10], [10, 6]]
N = 47


def stored(i):
    return photograph(i, SIZES[i * i % 7], "RGB")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """Pictures of seven sizes, labelled by their numbers; the first 17 also to validate on."""
    folder = tmp_path_factory.mktemp("sizes")

    def png(i):
        file = io.BytesIO()
        stored(i).save(file, "PNG")
        return file.getvalue()

    write_parquet(folder / "train.parquet", [png(i) for i in range(N)])
    write_parquet(folder / "test.parquet", [png(i) for i in range(17)])
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "maps"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    yield folder
    stop_workers()


def opened(path, **arguments):
    given = {"shape": (3, 8, 8), "streaming": False, "buckets": BUCKETS, "batch_size": 4}
    return module(path, **(given | arguments))


def taken(data, n):
    """The next n batches of training."""
    loader = data.train_dataloader()
    loader.steps = n
    return list(loader)


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
        for a, b in zip(ours, theirs, strict=True)
    )


# The bucket of a picture


def test_the_nearest_ratio_counts_and_then_the_nearest_area():
    buckets = Buckets([(64, 64), (128, 128), (48, 80), (80, 48)])
    assert buckets.nearest(100, 110) == (128, 128)
    assert buckets.nearest(50, 40) == (64, 64)
    assert buckets.nearest(1000, 1667) == (48, 80)
    # Between 1 and 2 by ratio lies √2: as far from the square as from twice as wide.
    two = Buckets([(10, 10), (10, 20)])
    assert two.nearest(100, 141) == (10, 10)
    assert two.nearest(100, 142) == (10, 20)


def test_a_picture_is_resized_and_its_middle_taken(path):
    (batch, *_) = taken(opened(path), 1)
    size = tuple(batch["image"].shape[2:])
    for image, number in zip(batch["image"], batch["index"].tolist(), strict=True):
        picture = torch.from_numpy(np.array(stored(number)).transpose(2, 0, 1))
        assert Buckets(BUCKETS).nearest(*picture.shape[1:]) == size
        assert torch.equal(image, Fit(size=size)(picture))


# The order of training


@pytest.mark.parametrize("size", [1, 3, 8, 50])
def test_the_lines_have_each_example_once_a_pass(size):
    bucket = np.random.default_rng(0).choice(4, N, p=[0.6, 0.3, 0.08, 0.02])
    order = BucketOrder(bucket, size, seed=3)
    times, seen = 4 * size, Counter()
    pieces = [one for epoch in range(times) for one in order.pieces(epoch)]
    for k, number in pieces:
        examples, passes = order.piece(k, number)
        assert (bucket[examples] == k).all()
        seen.update(zip(examples.tolist(), passes.tolist(), strict=True))
    assert set(seen.values()) == {1}
    # After a multiple of G passes nothing is left: each example has been used once in each pass.
    assert set(seen) == {(i, epoch) for i in range(N) for epoch in range(times)}
    assert len(set(pieces)) == len(pieces)


def test_the_order_is_a_pure_function_of_the_seed():
    bucket = np.arange(N) % 3
    one, other = BucketOrder(bucket, 4, seed=0), BucketOrder(bucket, 4, seed=0)
    late = [other.piece(*piece) for piece in other.pieces(9)]  # without the passes before
    for epoch in range(10):
        early = [one.piece(*piece) for piece in one.pieces(epoch)]
    assert all(map(np.array_equal, map(np.stack, early), map(np.stack, late)))
    assert one.pieces(0) != BucketOrder(bucket, 4, seed=1).pieces(0)
    kinds = [k for k, _ in one.pieces(9)]
    assert kinds != sorted(kinds)  # the buckets are mixed


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_make_the_same_step_from_the_same_bucket(path, workers):
    steps = 3 * N // 4  # three passes
    made = [
        taken(opened(path, place=(rank, 2), batch_size=2, num_workers=workers), steps)
        for rank in range(2)
    ]
    seen = Counter()
    for pair in zip(*made, strict=True):
        assert len({batch["image"].shape for batch in pair}) == 1
        for batch in pair:
            seen.update(batch["index"].tolist())
    assert set(seen) == set(range(N))
    assert max(seen.values()) - min(seen.values()) <= 2  # what is left and what was left over
    alone = taken(opened(path), steps)  # one rank with both ranks' batches
    for one, (a, b) in zip(alone, zip(*made, strict=True), strict=True):
        assert torch.equal(one["index"], torch.stack([a["index"], b["index"]], 1).flatten())
        assert torch.equal(one["image"][::2], a["image"])


def test_two_workers_make_the_batches_of_one(path):
    assert same(taken(opened(path), 30), taken(opened(path, num_workers=2), 30))


@pytest.mark.parametrize("workers", [0, 2])
def test_it_resumes_at_every_batch(path, workers):
    arguments = {
        "horizontal_flip": True,
        "transform": [{"class_path": "ColorJitter", "init_args": {"brightness": 0.5}}],
        "num_workers": workers,
    }
    whole = taken(opened(path, **arguments), 16)
    first = opened(path, **arguments)
    taken(first, 0)
    for k in range(0, 14, 5 if workers else 1):
        other = opened(path, **arguments)
        other.load_state_dict(first.state_dict())
        assert same(taken(other, 2), whole[k : k + 2])
        taken(first, 5 if workers else 1)


def test_flips_and_random_transforms_are_keyed_by_seed_pass_and_example(path):
    plain = opened(path)
    jitter = [{"class_path": "ColorJitter", "init_args": {"brightness": 0.5}}]
    changed = opened(path, horizontal_flip=True, transform=jitter)
    order = BucketOrder(plain._memory.bucket.numpy(), 4, seed=0)
    pieces = (piece for epoch in range(9) for piece in order.pieces(epoch))
    flipped = 0
    for piece, before, after in zip(pieces, taken(plain, 30), taken(changed, 30), strict=False):
        examples, passes = order.piece(*piece)
        assert torch.equal(before["index"], plain._memory.rows[examples])
        numbers = before["index"].tolist()
        with changed.transforms.isolated():
            images = [
                changed.transforms(image, epoch, i)
                for image, epoch, i in zip(before["image"], passes.tolist(), numbers, strict=True)
            ]
        coins = coin(0, passes, numbers)
        flipped += int(coins.sum())
        for image, heads, found in zip(images, coins, after["image"], strict=True):
            assert torch.equal(found, image.flip(-1) if heads else image)
    assert 30 < flipped < 90


# Validation


def test_validation_has_one_size_a_batch_and_every_example_once(path):
    for world in (1, 2, 3):
        made = [list(opened(path, place=(r, world)).val_dataloader()) for r in range(world)]
        assert len({len(one) for one in made}) == 1
        numbers = [i for one in made for batch in one for i in batch["index"].tolist()]
        assert sorted(numbers) == list(range(17))
        for batch in (batch for one in made for batch in one):
            assert batch["total"] == 17
            assert torch.equal(batch["label"], batch["index"])  # those of the stored order
            assert batch["index"].tolist() == sorted(batch["index"].tolist())
            sizes = {
                Buckets(BUCKETS).nearest(*stored(i).size[::-1]) for i in batch["index"].tolist()
            }
            assert sizes == {tuple(batch["image"].shape[2:])}


def test_ranks_that_cannot_have_equally_many_batches_are_refused():
    a, b, c = (1, 2, 2), (1, 2, 3), (1, 3, 2)
    assert [len(mine) for mine in divided_by_shape([a, a, b, b, b], 1, 2)] == [2, 2]
    with pytest.raises(ValueError, match="equally many batches of one shape on each of 2 ranks"):
        divided_by_shape([a, b, c], 4, 2)


def test_without_skipping_a_bad_validation_picture_is_an_error(path, tmp_path):
    write_parquet(tmp_path / "test.parquet", [b"no picture"] + [b""] * 3)
    (tmp_path / "train.parquet").write_bytes((path / "train.parquet").read_bytes())
    with pytest.raises(BadExample, match="decoded"):
        opened(tmp_path, on_bad_example="raise").val_dataloader()


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"streaming": True}, r"data\.buckets needs data\.streaming: false"),
        ({"transform": ["Fit"]}, "got also Fit in data.transform"),
        ({"buckets": [[8, 8], [8, 8]]}, "different sizes"),
        ({"buckets": [[8, 0]]}, "all positive"),
    ],
)
def test_arguments_that_contradict_buckets(path, arguments, message):
    with pytest.raises(ValueError, match=message):
        DataModule(**{"streaming": False, "shape": (3, 8, 8), "buckets": BUCKETS} | arguments)


def test_a_transform_must_leave_the_size_alone(path):
    crop = [{"class_path": "CenterCrop", "init_args": {"size": 6}}]
    with pytest.raises(ValueError, match="no transform may change the size"):
        opened(path, transform=crop)


def test_grey_pictures_among_coloured_ones_are_bad(path):
    with pytest.raises(ValueError, match=r"set data\.mode to the colours"):
        opened(path, shape=(1, 8, 8))
    batch = taken(opened(path, shape=(1, 8, 8), mode="L"), 1)[0]
    assert batch["image"].shape[1] == 1


def test_other_buckets_cannot_resume(path):
    data = opened(path)
    taken(data, 3)
    other = opened(path, buckets=BUCKETS[:2])
    other.load_state_dict(data.state_dict())
    with pytest.raises(ValueError, match=r"data\.buckets was \[\[8, 8\], \[6, 10\], \[10, 6\]\]"):
        other.train_dataloader()


def test_broken_pictures_are_skipped_and_an_empty_bucket_is_harmless(tmp_path):
    folder = save(tmp_path / "pictures", [photograph(i, (30, 20)) for i in range(12)])
    (folder / "003.png").write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="003"):
        data = opened(folder, label_key=None, val_split=None, max_bad_share=0.5)
    assert {batch["image"].shape for batch in taken(data, 9)} == {(4, 3, 6, 10)}


def test_statistics_of_a_whole_split_are_refused(path):
    data = opened(path)
    with pytest.raises(ValueError, match=r"of one size for statistics.*data\.transform \[Fit\]"):
        next(data.examples("train", 8))
    assert sum(len(batch["index"]) for batch in data.examples("train", 1)) == N


# Training


def model(network=None, **arguments):
    network = network or UNet(shape=(3, 8, 8), channels=(8, 8), attention=(4,))
    return LitDiffusion(network, **arguments)


def trainer(folder, **arguments):
    given = {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return L.Trainer(**given | arguments)


def data_of(path, **arguments):
    given = {"shape": (3, 8, 8), "streaming": False, "buckets": BUCKETS, "batch_size": 4}
    return DataModule(str(path), **given | arguments)


def narrow(**arguments):
    return DiT(shape=(3, 8, 8), depth=1, width=16, heads=2, **arguments)


NETWORKS = [
    lambda: UNet(shape=(3, 8, 8), channels=(8, 8), attention=(4,)),
    lambda: narrow(positions="resampled", rope=True),
    lambda: FourierFeatures(UNet(shape=(15, 8, 8), channels=(8,), attention=()), shape=(3, 8, 8)),
]


@pytest.mark.parametrize("make", NETWORKS)
def test_networks_for_any_size_train(path, tmp_path, make):
    job = trainer(tmp_path, max_steps=6, accumulate_grad_batches=2, callbacks=[SampleGrid(1, 2)])
    subject = model(make())
    before = [p.detach().clone() for p in subject.parameters()]
    job.fit(subject, data_of(path, steps_per_epoch=12))
    assert job.global_step == 6
    assert any(not torch.equal(a, b) for a, b in zip(before, subject.parameters(), strict=True))
    assert job.callback_metrics["val/loss"].isfinite()
    assert subject.sample(2, torch.Generator().manual_seed(0)).shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: narrow(), "positions='index' knows the places of"),
        (lambda: ResidualMLP(shape=(3, 8, 8)), "this ResidualMLP was built for"),
        (lambda: narrow(positions="resampled", patch=4), "whose sides are multiples of 4"),
        (lambda: UNet(shape=(3, 8, 8), channels=(8,) * 4), "6x10 pixels are too few"),
    ],
)
def test_networks_for_one_size_are_refused_before_the_first_step(path, tmp_path, make, message):
    job = trainer(tmp_path, max_steps=1)
    with pytest.raises(ValueError, match=f"The data have examples of several shapes: .*{message}"):
        job.fit(model(make()), data_of(path))
    assert job.global_step == 0


def test_other_sizes_are_refused_where_the_data_do_not_announce_them(path):
    subject = model()
    with pytest.raises(ValueError, match=r"Expected images of shape \(3, 8, 8\)"):
        subject.standard(torch.zeros(8, 3, 6, 10))
    subject.expect(data_of(path))
    subject.standard(torch.zeros(8, 3, 6, 10))
    with pytest.raises(ValueError, match=r"got \(3, 6, 12\)"):
        subject.standard(torch.zeros(8, 3, 6, 12))


def test_validation_does_not_depend_on_the_batches(path, tmp_path):
    losses = []
    for size in (1, 5):
        job = trainer(tmp_path)
        torch.manual_seed(0)
        (found,) = job.validate(model(), data_of(path, batch_size=size), verbose=False)
        losses.append(found["val/loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_operations_of_several_sizes_have_no_one_number(path, tmp_path):
    subject = model()
    subject.expect(data_of(path))
    with pytest.raises(RuntimeError, match="several sizes"):
        count_flops(subject, {"image": torch.zeros(2, 3, 8, 8)})


def test_a_run_resumes_bit_for_bit(path, tmp_path):
    def fit(name, steps, ckpt_path=None):
        torch.manual_seed(0)
        job = trainer(tmp_path / name, max_steps=steps, callbacks=[EMA(0.9)], limit_val_batches=0)
        job.fit(model(), data_of(path, steps_per_epoch=5), ckpt_path=ckpt_path)
        job.save_checkpoint(tmp_path / f"{name}-{steps}.ckpt")
        return tmp_path / f"{name}-{steps}.ckpt"

    whole = load_checkpoint(fit("whole", 9))["state_dict"]
    part = load_checkpoint(fit("part", 9, fit("part", 4)))["state_dict"]
    assert all(torch.equal(whole[key], part[key]) for key in whole)


@pytest.mark.slow
def test_killed_runs_with_buckets_end_as_if_nothing_had_happened(path, tmp_path):
    """Real processes, killed by SIGKILL at random moments and while a checkpoint is written."""
    words = [f"--data.path={path}", "--data.shape=[3,8,8]", "--data.streaming=false"]
    words += ["--data.buckets=[[8,8],[6,10],[10,6]]", "--data.horizontal_flip=true"]
    words += ["--model.network.num_classes=47", f"--data.cache_dir={tmp_path / 'maps'}"]
    code = (
        "import pathlib, sys, resume\n"
        "words, root = sys.argv[2:], pathlib.Path(sys.argv[1])\n"
        "for _, outcome in resume.torment({'buckets': words}, 3, 3, 0, root):\n"
        "    print(outcome.equal, outcome.kills, outcome.unreadable, outcome.problem)\n"
    )
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    variables["PYTHONPATH"] = f"{benchmarks}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    command = [sys.executable, "-c", code, tmp_path / "runs", *words]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr[-3000:]
    assert all(line.startswith("True ") and line.split()[2] == "0" for line in lines), lines
