"""`lit-diffusion new`: any folder gives a config that trains, or one sentence."""

import importlib
import io
import shutil
import tarfile
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
import yaml
from image_files import encode, write_parquet
from PIL import Image

from lit_diffusion.nn import UNet
from lit_diffusion.training import ImageDataModule, LitDiffusion, new
from lit_diffusion.training.commands.errors import UsageError
from lit_diffusion.training.commands.parsing import instantiate
from lit_diffusion.training.commands.proposal import data_arguments, propose_recipe, propose_shape
from lit_diffusion.training.commands.proposed_config import config_text
from lit_diffusion.training.commands.trial_steps import Trial
from lit_diffusion.training.data.survey import Files, Pixels
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


# Kinds of data that a user may have: each is a function of an empty folder that returns the path.


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


#: What the config of each must say.
TRAINS = {
    mixed: {"image_shape": [3, 24, 24], "mode": "RGB", "val_share": 0.1},
    classes: {"label_key": "label", "image_shape": [3, 24, 24], "val_share": 0.1},
    splits: {"label_key": "label", "val_split": "test"},
    nested: {"label_key": None, "image_shape": [3, 24, 24], "val_split": None},
    labelled_parquet: {"label_key": "label"},
    plain_parquet: {"label_key": None, "image_key": "picture", "image_shape": [1, 24, 24]},
    single_bits: {"image_shape": [1, 16, 16]},
    one_image: {"val_split": None, "batch_size": 8},
    grey_in_colour: {"image_shape": [1, 24, 24], "mode": "L"},
    tar: {"label_key": "cls", "image_key": "png", "path": "webdataset"},
}


@pytest.mark.parametrize("kind", TRAINS, ids=lambda kind: kind.__name__)
def test_a_kind_of_data_gives_a_config_of_which_batches_come(kind, tmp_path, quick):
    (folder := tmp_path / "my images").mkdir()
    proposed = new(kind(folder))
    config = yaml.safe_load(proposed.config.read_text())
    assert TRAINS[kind].items() <= config["data"].items()
    with Image.open(proposed.contact_sheet) as sheet:
        assert min(sheet.size) >= 24
    data = instantiate(ImageDataModule, config["data"])
    data.setup("fit")
    try:
        batch = next(iter(data.train_dataloader()))
        assert batch["image"].shape == (config["data"]["batch_size"], *data.image_shape)
        has_classes = config["data"]["label_key"] is not None
        assert ("label" in batch) == has_classes
        validates = config["data"]["val_split"] is not None or "val_share" in config["data"]
        assert bool(len(data.val_dataloader())) == validates
    finally:
        data.teardown("fit")
    arguments = config["model"]["network"]["init_args"]
    assert ("num_classes" in arguments) == has_classes
    if has_classes:
        assert batch["label"].max() < arguments["num_classes"]
    arguments["image_shape"] = config["data"]["image_shape"]
    model = instantiate(LitDiffusion, config["model"])
    assert model.denoiser.network.image_shape == data.image_shape


def test_what_is_reported(tmp_path, quick):
    (folder := tmp_path / "photos").mkdir()
    text = str(new(mixed(folder)))
    assert "39 examples in split 'train'" in text
    assert "sizes     40 × 30 (9), " in text
    assert "formats   JPEG 31, PNG 6, GIF 1" in text
    assert "modes     RGB 31, L 6, P 1" in text
    assert "2 of 39 cannot be used" in text
    assert "broken.jpg: expected an image that can be decoded" in text
    assert "moving.gif: expected one image, got an animation of 3" in text
    assert "2 other files: .DS_Store, Thumbs.db" in text
    assert "3 × 24 × 24, center crop" in text


def test_classes_are_named_and_their_balance_is_stated(tmp_path, quick):
    (tmp_path / "pets").mkdir()
    text = str(new(classes(tmp_path / "pets")))
    assert "2 (column 'label'), the largest is 1.5 times the smallest" in text
    assert "großer Hund 12, cat 8" in text


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


def arrays(folder):
    np.save(folder / "images.npy", np.zeros((5, 8, 8), np.uint8))
    return folder


def an_array(folder):
    return arrays(folder) / "images.npy"


def archive(folder):
    np.savez(folder / "images.npz", images=np.zeros((5, 8, 8), np.uint8))
    return folder / "images.npz"


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


def latents(folder):
    rows = []
    for _ in range(3):
        np.save(file := io.BytesIO(), np.zeros((4, 8, 8), np.float16))
        rows.append(file.getvalue())
    datasets.Dataset.from_dict({"latent": rows}).to_parquet(folder / "train.parquet")
    return folder


def numbers(folder):
    datasets.Dataset.from_dict({"age": [1, 2]}).to_parquet(folder / "train.parquet")
    return folder


#: What the sentence about each must contain.
REFUSED = {
    nothing: "is an empty folder",
    missing: "found none",
    text_file: "expected a parquet file or a folder",
    texts: "expected a column of images",
    arrays: "numpy arrays",
    an_array: "numpy arrays",
    archive: "numpy arrays",
    deep: "16 bit",
    animations: "an animation of 3",
    all_broken: "none of the 3",
    latents: "such as latents",
    numbers: "expected a column of images",
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
    single_bits(folder)
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
    names = sorted(file.name for file in single_bits(folder).iterdir())
    with pytest.raises(UsageError, match="start from another folder"):
        new(folder, folder / "my.yaml")
    monkeypatch.chdir(folder)
    with pytest.raises(UsageError, match="start from another folder"):
        new(".")
    assert sorted(file.name for file in folder.iterdir()) == names


@pytest.mark.parametrize("name", ["#1: it's", "null", "Fotos von Zoë [1]*", "a\tb", "${x}", "…"])
def test_any_name_of_a_folder_is_written_as_it_is(name, tmp_path, quick):
    (folder := tmp_path / name).mkdir()
    proposed = new(single_bits(folder))
    config = yaml.safe_load(proposed.config.read_text(encoding="utf-8"))
    assert config["data"]["path"] == str(folder)
    assert isinstance(config["name"], str)
    check_name(config["name"])


def test_few_grey_levels_give_a_decoder(tmp_path, quick):
    (folder := tmp_path / "bits").mkdir()
    model = yaml.safe_load(new(single_bits(folder)).config.read_text())["model"]
    assert model["weighting"] == "ELBOWeighting"
    assert model["decoder"] == {"class_path": "SoftmaxDecoder", "init_args": {"levels": 2}}
    (folder := tmp_path / "photographs").mkdir()
    model = yaml.safe_load(new(grey_in_colour(folder)).config.read_text())["model"]
    assert model["weighting"]["class_path"] == "SigmoidWeighting"
    assert "decoder" not in model


def test_what_is_asked_for_is_in_the_config(tmp_path, quick):
    (folder := tmp_path / "images").mkdir()
    grey_in_colour(folder)
    proposed = new(folder, size=100, horizontal_flip=True, looks=5)
    config = yaml.safe_load(proposed.config.read_text())
    assert proposed.survey.pixels.looked == 5
    assert config["data"]["horizontal_flip"] is True
    assert config["data"]["image_shape"] == [1, 100, 100]
    assert config["model"]["schedule"]["class_path"] == "ShiftedSchedule"
    for wrong in ({"size": 0}, {"looks": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            new(folder, "other.yaml", **wrong)


def test_steps_are_measured_on_this_machine(tmp_path):
    (folder := tmp_path / "bits").mkdir()
    proposed = new(single_bits(folder))
    trial = proposed.trial
    assert min(trial.seconds, trial.memory) > 0
    assert f"{trial.seconds:.3g} s a step" in proposed.config.read_text()
    assert trial.parameters > 100_000


@pytest.mark.slow
@pytest.mark.parametrize("kind", [mixed, classes, splits, single_bits, one_image, tar])
def test_the_config_trains_without_an_edit(kind, tmp_path, cli, quick):
    (folder := tmp_path / "my images").mkdir()
    code, out, err = cli("new", kind(folder), "--out", "my.yaml")
    assert code == 0, err
    assert "Next: lit-diffusion fit --config my.yaml" in out
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)
    code, out, err = cli("fit", "--config", "my.yaml", "--trainer.max_steps", 2)
    assert code == 0, err
    assert list(tmp_path.glob("runs/my-images/*/samples/step-0000002.png"))


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
    config["network"]["init_args"]["image_shape"] = [*shape.image_shape]
    with torch.device("meta"):
        network = UNet(**config["network"]["init_args"])
    assert any("Attention" in type(part).__name__ for part in network.modules())
    assert ("decoder" in config) == (len(levels) < 256)
    of_many = "ShiftedSchedule" if side > 64 else "CosineSchedule"
    expected = of_many if len(levels) == 256 else "LinearSchedule"
    assert config["schedule"]["class_path"] == expected
