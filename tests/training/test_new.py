"""`lit-diffusion new`: any folder gives a config that trains, or one sentence."""

import importlib
import shutil
from collections import Counter

import image_folders as make
import pytest
import torch
import yaml
from PIL import Image

from lit_diffusion.nn import UNet
from lit_diffusion.training import DataModule, LitDiffusion, new
from lit_diffusion.training.commands.proposal.config import config_text
from lit_diffusion.training.commands.proposal.recipe import (
    data_arguments,
    propose_recipe,
    propose_shape,
)
from lit_diffusion.training.commands.proposal.trial_steps import Trial
from lit_diffusion.training.commands.shell.errors import UsageError
from lit_diffusion.training.commands.shell.parsing import instantiate
from lit_diffusion.training.data.decoding.survey import Files, Pixels
from lit_diffusion.training.data.reading.held_out import is_held_out
from lit_diffusion.training.run.folder import check_name

module = importlib.import_module("lit_diffusion.training.commands.new")
MARKS = [
    pytest.mark.filterwarnings("ignore:skipped"),
    pytest.mark.filterwarnings("ignore:.*TorchVision:DeprecationWarning"),
]
pytestmark = [*MARKS, pytest.mark.usefixtures("alone")]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The working directory, beside the folder of images and not in it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def quick(monkeypatch):
    """Without the measured steps, which one test is about."""
    trial = Trial(0.25, 1.0, 10**6, "a test")
    monkeypatch.setattr(module, "try_steps", lambda *arguments: trial)


#: What the config of each must say.
TRAINS = {
    make.mixed: {"shape": [3, 24, 24], "mode": "RGB", "val_share": 0.1},
    make.classes: {"label_key": "label", "shape": [3, 24, 24], "val_share": 0.1},
    make.splits: {"label_key": "label", "val_split": "test"},
    make.nested: {"label_key": None, "shape": [3, 24, 24], "val_split": None},
    make.labelled_parquet: {"label_key": "label"},
    make.plain_parquet: {"label_key": None, "image_key": "picture", "shape": [1, 24, 24]},
    make.single_bits: {"shape": [1, 16, 16]},
    make.one_image: {"val_split": None, "batch_size": 8},
    make.grey_in_colour: {"shape": [1, 24, 24], "mode": "L"},
    make.tar: {"label_key": "cls", "image_key": "png", "path": "webdataset"},
    make.tars: {"label_key": "cls", "image_key": "png", "shape": [3, 24, 24]},
    make.hub_clone: {"label_key": "label", "shape": [3, 24, 24]},
    make.transparent: {"shape": [4, 24, 24], "val_split": None},
    make.opaque: {"shape": [3, 24, 24], "mode": "RGB"},
    make.cmyk: {"shape": [3, 20, 24], "mode": "RGB"},
    make.partly_deep: {"shape": [1, 24, 24], "max_bad_share": 0.09},
    make.arrays: {"shape": [3, 24, 24], "label_key": None, "val_share": 0.1},
    make.an_array: {"shape": [1, 24, 24]},
    make.archive: {"shape": [3, 24, 24], "label_key": "label", "val_split": "test"},
    make.a_file_each: {"shape": [3, 24, 24], "label_key": "label"},
    make.series: {"kind": "signal", "shape": [1, 100], "normalize": "mean_std"},
    make.channels_last: {"kind": "signal", "shape": [3, 64], "label_key": "label"},
    make.listed_series: {"kind": "signal", "image_key": "ecg", "label_key": "label"},
    make.listed_points: {"kind": "points", "shape": [3, 30], "image_key": "points"},
    make.vectors: {"kind": "vector", "shape": [7], "normalize": "mean_std"},
    make.volumes: {"kind": "volume", "shape": [1, 8, 10, 12]},
    make.float_pictures: {"kind": "latents", "shape": [3, 24, 24], "normalize": "mean_std"},
    make.latents: {"kind": "latents", "shape": [4, 8, 8], "image_key": "latent"},
}


@pytest.mark.parametrize("kind", TRAINS, ids=lambda kind: kind.__name__)
def test_a_kind_of_data_gives_a_config_of_which_batches_come(kind, tmp_path, quick):
    (folder := tmp_path / "my images").mkdir()
    proposed = new(kind(folder))
    config = yaml.safe_load(proposed.config.read_text())
    assert TRAINS[kind].items() <= config["data"].items()
    with Image.open(proposed.contact_sheet) as sheet:
        assert min(sheet.size) >= 24
    data = instantiate(DataModule, config["data"])
    data.setup("fit")
    try:
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (config["data"]["batch_size"], *data.shape)
        has_classes = config["data"]["label_key"] is not None
        assert ("label" in batch) == has_classes
        validates = config["data"].get("val_split") is not None or "val_share" in config["data"]
        assert bool(len(data.val_dataloader())) == validates
    finally:
        data.teardown("fit")
    arguments = config["model"]["network"]["init_args"]
    assert ("num_classes" in arguments) == has_classes
    if has_classes:
        assert batch["label"].max() < arguments["num_classes"]
    arguments["shape"] = config["data"]["shape"]
    model = instantiate(LitDiffusion, config["model"])
    assert model.denoiser.network.shape == data.shape


def test_what_is_reported(tmp_path, quick):
    (folder := tmp_path / "photos").mkdir()
    text = " ".join(str(new(make.mixed(folder))).split())  # without its breaks of lines
    assert "39 examples in split 'train' validation about 10% of them, held out" in text
    assert "sizes 40 × 30 (9), 30 × 40 (8), " in text
    assert "formats JPEG 31, PNG 6, GIF 1" in text
    assert "modes RGB 31, L 6, P 1" in text
    assert "2 of 39 cannot be used" in text
    assert "broken.jpg: expected an image that can be decoded" in text
    assert "moving.gif: expected one image, got an animation of 3" in text
    assert "2 other files: .DS_Store, Thumbs.db" in text
    assert "3 × 24 × 24, center crop" in text


def test_classes_are_named_and_their_balance_is_stated(tmp_path, quick):
    (tmp_path / "pets").mkdir()
    text = str(new(make.classes(tmp_path / "pets")))
    assert "2 (column 'label'), the largest is 1.5 times the smallest" in text
    assert "großer Hund 12, cat 8" in text


#: What the sentence about each must contain.
REFUSED = {
    make.nothing: "is an empty folder",
    make.missing: "found none",
    make.text_file: "expected a parquet, .npy or .npz file",
    make.texts: "expected a column of images",
    make.deep: "16 bit",
    make.animations: "an animation of 3",
    make.all_broken: "none of the 3",
    make.uneven: "arrays of 12 shapes, such as ",
    make.on_the_hub: "cannot be opened",
    make.numbers: "expected a column of images",
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_a_kind_of_data_that_cannot_be_used_gives_one_sentence(kind, tmp_path, cli):
    (folder := tmp_path / "data").mkdir()
    code, out, err = cli("new", kind(folder))
    assert code == 2, err
    assert not out
    lines = [line for line in err.splitlines() if line.startswith("lit-diffusion: error:")]
    assert len(lines) == 1, err
    assert REFUSED[kind] in lines[0]
    assert not [*tmp_path.glob("*.yaml"), *tmp_path.glob("*.png")]


def test_nothing_is_overwritten(tmp_path, quick):
    (folder := tmp_path / "images").mkdir()
    make.single_bits(folder)
    first = new(folder)
    assert (first.config.name, first.contact_sheet.name) == ("images.yaml", "images.png")
    with pytest.raises(UsageError, match=r"images\.yaml exists already"):
        new(folder)
    second = new(folder, "other.yaml")
    second.config.unlink()
    before = second.contact_sheet.read_bytes()
    with pytest.raises(UsageError, match=r"other\.png exists already"):
        new(folder, "other.yaml")
    assert second.contact_sheet.read_bytes() == before
    with pytest.raises(UsageError, match=r"must be a \.yaml file"):
        new(folder, "my.txt")


def test_nothing_is_written_into_the_folder_of_the_images(tmp_path, quick, monkeypatch):
    (folder := tmp_path / "images").mkdir()
    names = sorted(file.name for file in make.single_bits(folder).iterdir())
    with pytest.raises(UsageError, match="start from another folder"):
        new(folder, folder / "my.yaml")
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="start from another folder"):
        new(".")
    assert sorted(file.name for file in folder.iterdir()) == names


@pytest.mark.parametrize("name", ["#1: it's", "null", "Fotos von Zoë [1]*", "a\tb", "${x}", "…"])
def test_any_name_of_a_folder_is_written_as_it_is(name, tmp_path, quick):
    (folder := tmp_path / name).mkdir()
    proposed = new(make.single_bits(folder))
    config = yaml.safe_load(proposed.config.read_text(encoding="utf-8"))
    assert config["data"]["path"] == str(folder)
    assert isinstance(config["name"], str)
    check_name(config["name"])


def test_few_grey_levels_give_a_decoder(tmp_path, quick):
    (folder := tmp_path / "bits").mkdir()
    model = yaml.safe_load(new(make.single_bits(folder)).config.read_text())["model"]
    assert model["weighting"] == "ELBOWeighting"
    assert model["decoder"] == {"class_path": "SoftmaxDecoder", "init_args": {"levels": 2}}
    (folder := tmp_path / "photographs").mkdir()
    model = yaml.safe_load(new(make.grey_in_colour(folder)).config.read_text())["model"]
    assert model["weighting"]["class_path"] == "SigmoidWeighting"
    assert "decoder" not in model


def test_the_shipped_digits_are_recognised(quick):
    proposed = new("digits8x8")
    config = yaml.safe_load(proposed.config.read_text())
    assert config["data"]["path"] == "digits8x8"
    assert (config["data"]["shape"], config["data"]["val_split"]) == ([1, 8, 8], "test")
    network = config["model"]["network"]["init_args"]
    assert [network[k] for k in ("num_classes", "fourier", "attention")] == [
        10,
        [3, 4],
        [8, 4],
    ]
    assert config["model"]["decoder"]["init_args"] == {"levels": 17}
    assert "Likelihood" in config["trainer"]["callbacks"]
    assert (proposed.survey.total, proposed.survey.labels.total()) == (1500, 1500)


def test_what_is_asked_for_is_in_the_config(tmp_path, quick):
    (folder := tmp_path / "images").mkdir()
    make.grey_in_colour(folder)
    proposed = new(folder, size=100, horizontal_flip=True, looks=5)
    config = yaml.safe_load(proposed.config.read_text())
    assert proposed.survey.pixels.looked == 5
    assert config["data"]["horizontal_flip"] is True
    assert config["data"]["shape"] == [1, 100, 100]
    assert config["model"]["schedule"]["class_path"] == "ShiftedSchedule"
    for wrong in ({"size": 0}, {"looks": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            new(folder, "other.yaml", **wrong)


def test_what_is_for_pictures_is_refused_for_arrays(tmp_path, quick):
    (folder := tmp_path / "numbers").mkdir()
    for wrong in ({"size": 8}, {"horizontal_flip": True}):
        with pytest.raises(UsageError, match="leave it out"):
            new(make.vectors(folder), **wrong)
    assert not [*tmp_path.glob("*/*.yaml")]


def test_transparency_and_the_kind_of_arrays_are_reported(tmp_path, quick):
    (folder := tmp_path / "icons").mkdir()
    text = " ".join(str(new(make.transparent(folder))).split())
    assert "12 have transparent pixels: transparency is part of the picture" in text
    (folder := tmp_path / "shots").mkdir()
    text = " ".join(str(new(make.opaque(folder), "shots.yaml")).split())
    assert "1 have transparent pixels: transparency is left out" in text
    (folder := tmp_path / "waves").mkdir()
    text = " ".join(str(new(make.series(folder), "waves.yaml")).split())
    assert "arrays float32 24 shapes 100 (24); correlation of neighbours by axis: 0.9" in text
    assert "signal of 1 × 100, normalised by mean_std" in text
    assert "flow matching" in text


def test_steps_are_measured_on_this_machine(tmp_path):
    (folder := tmp_path / "bits").mkdir()
    proposed = new(make.single_bits(folder))
    trial = proposed.trial
    assert min(trial.seconds, trial.memory) > 0
    assert f"{trial.seconds:.3g} s a step" in proposed.config.read_text()
    assert trial.parameters > 100_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        make.mixed,
        make.classes,
        make.splits,
        make.single_bits,
        make.one_image,
        make.tar,
        make.transparent,
        make.archive,
        make.series,
        make.channels_last,
        make.listed_points,
        make.vectors,
        make.volumes,
        make.float_pictures,
        make.latents,
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_config_trains_without_an_edit(kind, tmp_path, cli, quick):
    (folder := tmp_path / "my images").mkdir()
    code, out, err = cli("new", kind(folder), "--out", "my.yaml")
    assert code == 0, err
    assert "Next: lit-diffusion fit --config my.yaml" in out
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    code, out, err = cli("fit", "--config", "my.yaml", "--trainer.max_steps", 2)
    assert code == 0, err
    assert list(tmp_path.glob("runs/*/*/samples/step-0000002.png"))


def test_a_share_that_holds_out_nothing_is_not_proposed(tmp_path, quick):
    (folder := tmp_path / "images").mkdir()
    names = [name for name in (f"{k}.png" for k in range(99)) if not is_held_out(name, 0.1)]
    for k, name in enumerate(names[:25]):
        make.photograph(k).save(folder / name)
    data = yaml.safe_load(new(folder).config.read_text())["data"]
    assert "val_share" not in data
    assert data["val_split"] is None


def test_an_address_with_a_secret_is_not_written(tmp_path, quick):
    with pytest.raises(UsageError, match="would be written into the config") as error:
        new("https://me:hunter2@example.org/train.parquet")
    assert "hunter2" not in str(error.value)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("levels", [tuple(range(256)), (0, 255), (0, 3, 255)])
@pytest.mark.parametrize("side", [1, 4, 7, 8, 15, 28, 48, 64, 100])
def test_every_size_has_a_network_with_attention(side, levels, fast):
    files = Files(Counter(PNG=9), Counter({(side, side): 9}), Counter(RGB=9), False, None, 9)
    shape = propose_shape(files, fast, side)
    pixels = Pixels(9, [], 0, levels, 0.0, 1.0, Counter(), torch.empty(0), None)
    recipe = propose_recipe(shape, pixels, 9, fast)
    text = config_text(
        title="t",
        file="f",
        name="n",
        remarks=[],
        data=data_arguments(shape, None, None, 9),
        shape=shape,
        recipe=recipe,
        num_classes=3,
        total=9,
    )
    config = yaml.safe_load(text)["model"]
    config["network"]["init_args"]["shape"] = [*shape.shape]
    with torch.device("meta"):
        network = UNet(**config["network"]["init_args"])
    assert any("Attention" in type(part).__name__ for part in network.modules())
    assert ("decoder" in config) == (len(levels) < 256)
    of_many = "ShiftedSchedule" if side > 64 else "CosineSchedule"
    expected = of_many if len(levels) == 256 else "LinearSchedule"
    assert config["schedule"]["class_path"] == expected
