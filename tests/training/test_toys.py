"""Data of one and two numbers: the sets that are shipped, their lessons, and their pictures."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.nn import FourierFeatures, ResidualMLP, UNet
from lit_diffusion.training import DataModule, LitDiffusion, SampleGrid
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.run.image_pictures import BAR, MARGIN

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "lit_diffusion" / "data"


def bytes_of(path, shape):
    """All training and test examples as the module hands them out, as bytes (n, C·H·W)."""
    data = DataModule(path, shape=shape, label_key=None, batch_size=256)
    data.setup("fit")
    loader = iter(data.train_dataloader())
    train = [next(loader) for _ in range(len(data.train_dataloader()))]
    splits = []
    for batches in (train, list(data.val_dataloader())):
        assert all("label" not in batch for batch in batches)
        images = torch.cat([batch["image"] for batch in batches])
        assert images.dtype == torch.uint8
        assert images.shape[1:] == shape
        x = data.on_after_batch_transfer({"image": images[:3]}, 0)["image"]
        torch.testing.assert_close(x, images[:3] / 127.5 - 1)
        splits.append(images.flatten(1).long())
    data.teardown("fit")
    return splits


def made_by_the_readme(name, folder, monkeypatch):
    """What the README's script writes, by split."""
    import pyarrow.parquet as pq

    text = (SHIPPED / name / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    monkeypatch.chdir(folder)
    names = {}
    exec(code, names)
    made = [pq.read_table(f"{split}.parquet")["image"].to_pylist() for split in ("train", "test")]
    return [torch.tensor(images).flatten(1) for images in made], names


def sort(points):
    return sorted(map(tuple, points.tolist()))


def test_the_swirl_is_1024_points_known_exactly(tmp_path, monkeypatch):
    train, test = bytes_of("swirl", (2, 1, 1))
    assert len(train) == len(set(sort(train))) == 1024
    assert sort(train) == sort(test)  # so its entropy is log2(1024)/2 = 5 bits per dimension
    made, _ = made_by_the_readme("swirl", tmp_path, monkeypatch)
    assert torch.equal(made[1], test)


def test_the_line_is_drawn_from_the_peaks_of_its_readme(tmp_path, monkeypatch):
    train, test = bytes_of("toy1d", (1, 1, 1))
    assert (len(train), len(test)) == (4096, 1024)
    made, names = made_by_the_readme("toy1d", tmp_path, monkeypatch)
    assert torch.equal(made[1], test)
    assert sort(made[0]) == sort(train)
    pmf = torch.from_numpy(names["pmf"])
    assert float(pmf.sum()) == pytest.approx(1)
    assert float(torch.special.entr(pmf).sum() / torch.log(torch.tensor(2))) == pytest.approx(
        6.3448, abs=1e-4
    )
    bits = -pmf[train[:, 0]].log2().mean()
    assert float(bits) == pytest.approx(6.345, abs=0.05)


@pytest.mark.parametrize("name", ["swirl", "toy1d", "oscillations", "ellipses"])
def test_the_readme_names_the_files(name):
    import hashlib

    text = (SHIPPED / name / "README.md").read_text()
    for file in sorted((SHIPPED / name).glob("*.parquet")):
        assert file.name in text
        assert hashlib.sha256(file.read_bytes()).hexdigest() in text


@pytest.mark.parametrize(
    ("name", "column", "shape"),
    [("oscillations", "signal", (1, 64)), ("ellipses", "points", (32, 2))],
)
def test_the_readme_makes_the_examples_of_the_formula(name, column, shape, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    text = (SHIPPED / name / "README.md").read_text()
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    for split in ("train", "test"):
        made, kept = (
            torch.tensor(pq.read_table(folder / f"{split}.parquet")[column].to_pylist())
            for folder in (tmp_path, SHIPPED / name)
        )
        assert made.shape[1:] == shape
        assert torch.equal(made, kept)


# Lessons -------------------------------------------------------------------------------------


FAST = [
    "--trainer.max_steps=2",
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    "--data.steps_per_epoch=2",
    "--data.batch_size=4",
    "--data.val_examples=6",
    "--data.num_workers=0",
    "--trainer.log_every_n_steps=1",
]


@pytest.mark.parametrize("name", ["swirl", "toy1d"])
def test_lesson_runs(cli, configs, name):
    from PIL import Image

    code, out, err = cli(
        "fit", "--config", configs / f"{name}.yaml", *FAST, "--model.sampler.steps=2"
    )
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    checkpoint = folder / "checkpoints" / "last.ckpt"
    network = LitDiffusion.load_from_checkpoint(checkpoint).denoiser.network
    assert network.shape == {"swirl": (2, 1, 1), "toy1d": (1, 1, 1)}[name]
    assert type(network.network) is ResidualMLP
    code, _, err = cli("sample", "--ckpt_path", checkpoint, "--num_samples=50", "--out=points.png")
    assert code == 0, err
    height = {"swirl": 512, "toy1d": BAR}[name] + 2 * MARGIN
    for path in (*folder.glob("samples/*.png"), Path("points.png")):
        with Image.open(path) as picture:
            assert picture.size == (512 + 2 * MARGIN, height)


def test_a_wrapper_by_bare_name_hands_the_shape_on(cli, configs, tmp_path):
    config = tmp_path / "waves.yaml"
    config.write_text(
        "model:\n  network:\n    class_path: FourierFeatures\n    init_args:\n"
        "      exponents: [3, 4]\n      network:\n        class_path: FourierFeatures\n"
        "        init_args:\n          exponents: [6]\n          network:\n"
        "            class_path: UNet\n            init_args: {channels: [8], num_classes: 10}\n"
    )
    fast = [*FAST, "--model.sampler.steps=2"]
    code, _, err = cli("fit", "--config", configs / "digits.yaml", "--config", config, *fast)
    assert code == 0, err
    checkpoint = next(Path("runs").glob("**/last.ckpt"))
    network = LitDiffusion.load_from_checkpoint(checkpoint).denoiser.network
    assert isinstance(network, FourierFeatures)
    assert (network.exponents, network.network.exponents) == ((3, 4), (6,))
    inner = network.network.network
    assert isinstance(inner, UNet)
    shapes = [net.shape for net in (network, network.network, inner)]
    assert shapes == [(1, 8, 8), (5, 8, 8), (15, 8, 8)]
    assert network.num_classes == 10
    # From the checkpoint's description, too.
    code, _, err = cli(
        "validate", "--config", configs / "digits.yaml", f"--ckpt_path={checkpoint}",
        "--data.val_examples=5", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
    )  # fmt: skip
    assert code == 0, err


# Pictures ------------------------------------------------------------------------------------


def ink(picture):
    """Where a picture is not paper: dark is 1."""
    return 1 - picture[0].float() / 255


def test_a_point_ends_at_its_pixel(tmp_path):
    # Level 200 to the right, level 30 from below; twenty of them, for a full dot.
    point = torch.tensor([200, 30]) / 127.5 - 1
    picture = save_grid(point.view(1, 2, 1, 1).expand(20, 2, 1, 1), tmp_path / "p.png", 5)
    assert picture.dtype == torch.uint8
    assert picture.shape == (3, 512 + 2 * MARGIN, 512 + 2 * MARGIN)
    rows, columns = (ink(picture) > 0.8).nonzero().T
    assert (int(rows.min()), int(rows.max())) == (MARGIN + 2 * 225 - 1, MARGIN + 2 * 225 + 2)
    assert (int(columns.min()), int(columns.max())) == (MARGIN + 399, MARGIN + 402)
    # The other shapes of two numbers, and what lies outside [−1, 1], are drawn as well.
    again = save_grid(point.view(1, 1, 1, 2).expand(20, 1, 1, 2), tmp_path / "p.png", 5)
    assert torch.equal(again, picture)
    corner = save_grid(torch.full((20, 2, 1, 1), 7.0), tmp_path / "p.png", 5)
    assert ink(corner)[MARGIN, MARGIN + 511] > 0.8


def test_more_points_are_darker(tmp_path):
    points = torch.tensor([[-0.5, 0.3]] * 1 + [[0.4, 0.3]] * 3).view(4, 2, 1, 1)
    dark = ink(save_grid(points, tmp_path / "p.png", 2))
    assert 0.3 < dark[:, : MARGIN + 256].max() < dark[:, MARGIN + 256 :].max()


def test_bars_are_as_high_as_their_counts(tmp_path):
    levels = torch.tensor([10] * 8 + [100] * 4 + [101] * 2 + [255])
    images = (levels / 127.5 - 1).view(-1, 1, 1, 1)
    picture = save_grid(images, tmp_path / "bars.png", 5)
    dark = ink(picture)[MARGIN:-MARGIN, MARGIN:-MARGIN] > 0.8
    assert picture.shape == (3, BAR + 2 * MARGIN, 512 + 2 * MARGIN)
    heights = dark.sum(0)
    expected = torch.zeros(256, dtype=torch.long)
    expected[[10, 100, 101, 255]] = BAR // 8 * torch.tensor([8, 4, 2, 1])
    assert torch.equal(heights, expected.repeat_interleave(2))
    assert dark[-1, 20]  # they stand on the ground


def test_images_are_a_grid_as_ever(tmp_path):
    picture = save_grid(torch.zeros(4, 1, 1, 3), tmp_path / "grid.png", 2)
    assert picture.shape[0] == 3
    assert len(picture.unique()) == 2


# Progress ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "bar"), [(101, True), (100, True), (101, False)])
def test_a_long_walk_shows_a_bar_if_the_trainer_does(tmp_path, monkeypatch, steps, bar):
    from lit_diffusion.training import module

    shown = []

    def watch(levels, **settings):
        shown.append((len(levels), settings["leave"]))
        return iter(levels)

    monkeypatch.setattr(module, "tqdm", watch)
    model = LitDiffusion(
        ResidualMLP((2, 1, 1), features=4),
        shape=(2, 1, 1),
        sampler=ld.DDIMSampler(steps=steps),
    )
    trainer = L.Trainer(
        default_root_dir=tmp_path, accelerator="cpu", callbacks=[SampleGrid(rows=1, columns=2)],
        enable_progress_bar=bar, max_steps=1, enable_model_summary=False, logger=False,
        enable_checkpointing=False, num_sanity_val_steps=0,
    )  # fmt: skip
    monkeypatch.setattr(type(trainer), "log_dir", str(tmp_path), raising=False)
    data = DataModule(
        "swirl", shape=(2, 1, 1), label_key=None, batch_size=4, val_examples=4,
        steps_per_epoch=1,
    )  # fmt: skip
    trainer.fit(model, data)
    assert len(list(tmp_path.glob("samples/*.png"))) == 1
    once = [(101, False)] if bar and steps > 100 else []
    assert shown == once
    trainer.predict(model, data)  # `predict` as well
    assert shown == 2 * once
