"""Names of classes: from the data into checkpoint, export, `sample`, the grids and the report."""

import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from test_own_data import trainer

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import DataModule, LitDiffusion, Overview, SampleGrid, sample
from lit_diffusion.training.data.reading.class_names import class_names
from lit_diffusion.training.reporting.parts import COLUMNS
from lit_diffusion.training.reporting.write import write_report

NAMES = ["daisy", "roses", "tulips"]


@pytest.fixture(scope="module")
def flowers(tmp_path_factory):
    """Images in a folder of each class, and the same as parquet with a ClassLabel."""
    root = tmp_path_factory.mktemp("flowers")
    for split in ("train", "test"):
        for i, name in enumerate(NAMES):
            folder = root / "folder" / split / name
            folder.mkdir(parents=True)
            for k in range(2):
                pixels = np.full((8, 8), 40 * i + k, np.uint8)
                Image.fromarray(pixels).save(folder / f"{k}.png")
        (root / "parquet").mkdir(exist_ok=True)
        images = [Image.fromarray(np.full((8, 8), i, np.uint8)) for i in range(6)]
        features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
        made = datasets.Dataset.from_dict(
            {"image": images, "label": [0, 0, 1, 1, 2, 2]}, datasets.Features(features)
        )
        made.to_parquet(root / "parquet" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_they_are_those_of_the_folders_or_of_the_column(flowers, kind, streaming):
    data = DataModule(str(flowers / kind), shape=(1, 8, 8), streaming=streaming)
    assert class_names(data) == NAMES


def test_numbers_are_no_names():
    assert class_names(DataModule()) is None
    assert class_names(DataModule(label_key=None)) is None
    assert class_names(object()) is None


def test_they_reach_the_checkpoint_the_export_and_sample(flowers, cli):
    model = LitDiffusion(
        UNet(channels=(8,), attention=(), num_classes=3), sampler=ld.DDIMSampler(steps=2)
    )
    run = trainer(Path.cwd(), max_steps=1, max_epochs=-1, use_distributed_sampler=False)
    run.fit(model, DataModule(str(flowers / "parquet"), shape=(1, 8, 8), batch_size=2))
    run.save_checkpoint("x.ckpt")
    assert LitDiffusion.load_from_checkpoint("x.ckpt").class_names == NAMES
    by_name, by_number = (
        sample("x.ckpt", num_samples=4, label=label, out="a.npy", device="cpu").images.clone()
        for label in (["roses", "none"], [1, -1])
    )
    assert torch.equal(by_name, by_number)
    code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--label=roses", "--num_samples=1")
    assert code == 0, err
    code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--label=lily")
    assert code == 2
    assert "one of daisy, roses, tulips, got 'lily'" in err
    code, _, err = cli("export", "x.ckpt", "--out=exported")
    assert code == 0, err
    assert ld.load_pretrained("exported").class_names == NAMES
    assert "3: daisy, roses, tulips" in Path("exported/README.md").read_text()


class Pictures(CSVLogger):
    """A logger that takes pictures, and keeps their captions."""

    def log_image(self, name, paths, step, caption):
        if name == "samples":
            self.captions = caption


def test_they_are_beside_the_grids_in_the_run_and_the_report(flowers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = LitDiffusion(
        UNet(channels=(8,), attention=(), num_classes=3), sampler=ld.DDIMSampler(steps=2)
    )
    logger = Pictures(Path.cwd(), "", "")
    data = DataModule(str(flowers / "parquet"), shape=(1, 8, 8), batch_size=2)
    trainer(
        Path.cwd(),
        max_steps=1,
        max_epochs=-1,
        use_distributed_sampler=False,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[SampleGrid(2, 4), Overview()],
    ).fit(model, data)
    columns = [*NAMES, "daisy"]
    (grid,) = Path("samples").glob("step-*.png")
    with Image.open(grid) as opened:
        opened.load()
        assert json.loads(opened.text[COLUMNS]) == columns
    assert logger.captions == [f"after 1 steps; columns: {', '.join(columns)}"]
    assert json.loads(Path("class_names.json").read_text()) == NAMES
    page = write_report(Path.cwd()).read_text()
    assert "".join(f"<li>{name}</li>" for name in columns) in page
    assert f"Samples after 1 steps; columns: {', '.join(columns)}" in page
    assert "class_names.json" in page


def test_sample_names_columns_and_folders(tmp_path):
    model = LitDiffusion(
        UNet(channels=(8,), attention=(), num_classes=3), sampler=ld.DDIMSampler(steps=2)
    )
    model.class_names = ["tench, Tinca tinca", "../..", "Ä" * 300]
    run = trainer(tmp_path, max_steps=0)
    run.strategy.connect(model)
    run.save_checkpoint(tmp_path / "x.ckpt")
    out = sample(tmp_path / "x.ckpt", per_class=1, out=tmp_path / "images", device="cpu").path
    assert sorted(path.parent.name for path in out.rglob("*.png")) == [
        "0-tench, Tinca tinca",
        "1-.._",
        f"2-{'Ä' * 80}",
    ]
    grid = sample(
        tmp_path / "x.ckpt", label=[0, -1], num_samples=4, out=tmp_path / "a.png", device="cpu"
    )
    with Image.open(grid.path) as opened:
        opened.load()
        assert json.loads(opened.text[COLUMNS]) == ["tench, Tinca tinca", "none"]
