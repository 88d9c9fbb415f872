"""The data module: kinds of data, validation, errors that say what to do, and runs with Lightning.

Labels of the small data sets made here are the examples' numbers, so a batch tells who is in it.
"""

import json

import datasets
import lightning as L
import numpy as np
import pytest
import torch
from image_files import (
    PARDONS,
    N,
    encode,
    labels,
    module,
    picture,
    pixels,
    same,
    stored,
    take,
    write_parquet,
    write_sixty,
)
from PIL import Image

from lit_diffusion.training.data.module import DataModule

pytestmark = [pytest.mark.usefixtures("alone")]
pytestmark += [pytest.mark.filterwarnings(pardon) for pardon in PARDONS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sixty(tmp_path_factory.mktemp("sixty"))


# --- the shipped digits


def test_shipped_digits():
    data = DataModule()
    data.setup("fit")
    train = take(data.train_dataloader(), 1500 // 4 // 64 * 4 + 4)
    assert len(data.train_dataloader()) == 1500 // 64
    assert train[0]["image"].dtype == torch.uint8
    assert train[0]["label"].dtype == torch.int64
    val = list(data.val_dataloader())
    assert sum(len(batch["index"]) for batch in val) == val[0]["total"] == 297
    whole = DataModule(val_split="train", val_examples=None, streaming=False)
    whole.setup("validate")
    images = torch.cat([batch["image"] for batch in whole.val_dataloader()])
    counts = torch.cat([batch["label"] for batch in whole.val_dataloader()]).bincount()
    assert images.shape == (1500, 1, 8, 8)
    assert counts.tolist() == [151, 157, 142, 155, 143, 157, 151, 148, 151, 145]
    x = images.double() / 255
    assert x.mean().item() == pytest.approx(0.3055, abs=5e-5)
    assert x.std().item() == pytest.approx(0.3759, abs=5e-5)
    assert set(images.unique().tolist()) <= {round(v * 255 / 16) for v in range(17)}


def test_bytes_become_numbers_on_the_device():
    data = DataModule()
    x = data.on_after_batch_transfer({"image": torch.tensor([0, 255, 51], dtype=torch.uint8)}, 0)
    assert x["image"].tolist() == pytest.approx([-1, 1, -0.6])
    floats = {"image": torch.randn(3)}
    assert data.on_after_batch_transfer(floats, 0) is floats


def test_arguments_are_attributes_and_documented():
    import inspect

    data = DataModule(shape=[3, 5, 7])
    assert data.shape == (3, 5, 7)
    for name in inspect.signature(DataModule).parameters:
        assert hasattr(data, name)
        assert f"        {name}: " in DataModule.__doc__


# --- validation


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_covers_the_set_on_any_number_of_ranks(folder, world, batch_size):
    loaders = [
        module(folder, (rank, world), "validate", batch_size=batch_size).val_dataloader()
        for rank in range(world)
    ]
    assert len({len(loader) for loader in loaders}) == 1
    batches = [batch for loader in loaders for batch in loader]
    index = torch.cat([batch["index"] for batch in batches])
    assert index.tolist() == list(range(10))
    assert index.dtype == torch.int64
    assert torch.equal(index, torch.cat([batch["label"] for batch in batches]))
    assert torch.equal(
        torch.cat([batch["image"] for batch in batches]), torch.from_numpy(pixels(N)[:10])
    )
    assert all(batch["total"] == 10 and len(batch["index"]) for batch in batches)


def test_validation_is_the_same_each_time_and_can_be_shortened(folder):
    loader = module(folder, stage="validate", val_examples=7, streaming=False).val_dataloader()
    for batch in loader:
        batch["image"] = None  # what a consumer does to its batch stays with it
    assert torch.cat([batch["image"] for batch in loader]).shape[0] == 7
    assert next(iter(loader))["total"] == 7


def test_more_ranks_than_examples(folder):
    with pytest.raises(ValueError, match="at least one validation example for each of 11 ranks"):
        module(folder, (0, 11), "validate").val_dataloader()
    with pytest.raises(ValueError, match="at least one example for each of 31 ranks × 2 workers"):
        module(folder, (0, 31), num_workers=2).train_dataloader()


# --- kinds of data


@pytest.mark.parametrize("streaming", [True, False])
def test_folder_of_images(tmp_path, streaming):
    images = pixels(12, (3, 5, 7))
    for split in ("train", "test"):
        for number, image in enumerate(images):
            file = tmp_path / "set" / split / f"class{number % 2}" / f"{number:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encode(image))
    data = module(tmp_path / "set", shape=(3, 5, 7), batch_size=4, streaming=streaming)
    epoch = take(data.train_dataloader(), 3)
    seen = torch.cat([batch["image"] for batch in epoch])
    assert sorted(map(bytes, seen.numpy())) == sorted(map(bytes, images))
    assert sorted(labels(epoch)) == [0] * 6 + [1] * 6
    assert labels(epoch) != sorted(labels(epoch))
    val = next(iter(data.val_dataloader()))
    assert torch.equal(val["image"][0], torch.from_numpy(images[0]))


@pytest.mark.parametrize("files", [1, 5])
def test_data_of_unknown_length(tmp_path, files):
    """JSON lines with arrays in them: shards are dealt, or examples when shards are too few."""
    images = pixels(20, (2, 3, 4))
    for number in range(files):
        rows = range(number * 20 // files, (number + 1) * 20 // files)
        lines = [json.dumps({"image": images[i].tolist(), "label": i}) for i in rows]
        (tmp_path / f"{number}.jsonl").write_text("\n".join(lines))
    source = {"data_files": {"train": str(tmp_path / "*.jsonl")}, "val_split": None}
    settings = source | {"shape": (2, 3, 4), "batch_size": 5, "num_workers": 2}
    settings |= {"shuffle_window": 3}
    loader = module("json", **settings).train_dataloader()
    assert len(loader) == 1000
    if files == 1:
        assert sorted(labels(take(loader, 4))) == list(range(20))
    else:
        assert set(labels(take(loader, 6))) == set(range(20))
    take(loader, 1)
    state = loader.state_dict()
    expected = take(loader, 7)
    resumed = module("json", **settings).train_dataloader()
    resumed.load_state_dict(state)
    assert same(take(resumed, 7), expected)
    batch = expected[0]
    assert torch.equal(batch["image"], torch.from_numpy(images[batch["label"].numpy()]))


def test_one_parquet_file_without_labels(tmp_path):
    write_parquet(tmp_path / "some.parquet", [encode(image) for image in pixels(10)])
    data = module(tmp_path / "some.parquet", label_key=None, val_split="train", batch_size=4)
    assert list(take(data.train_dataloader(), 1)[0]) == ["image", "index"]
    assert len(data.train_dataloader()) == 2
    assert list(next(iter(data.val_dataloader()))) == ["image", "index", "total"]


@pytest.mark.parametrize(
    ("mode", "kind", "channels"),
    [
        ("L", "PNG", 1),
        ("1", "PNG", 1),
        ("LA", "PNG", 1),
        ("LA", "PNG", 2),
        ("RGB", "PNG", 3),
        ("RGB", "BMP", 3),
        ("RGB", "TIFF", 3),
        ("P", "PNG", 3),
        ("P", "GIF", 3),
        ("RGBA", "PNG", 3),
        ("RGBA", "PNG", 4),
        ("CMYK", "JPEG", 3),
    ],
)
def test_encodings_are_undone(tmp_path, mode, kind, channels):
    image = picture(mode)
    write_parquet(tmp_path / "x.parquet", [stored(image, kind)])
    data = module(tmp_path / "x.parquet", val_split="train", shape=(channels, 5, 7))
    got = next(iter(data.val_dataloader()))["image"][0]
    plain = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    expected = np.asarray(image.convert(plain)).reshape(5, 7, channels).transpose(2, 0, 1)
    if kind == "JPEG":
        assert np.abs(got.numpy().astype(int) - expected).mean() < 40
    else:
        assert np.array_equal(got.numpy(), expected)


# --- what can be wrong


def bad_images():
    see_through = picture("RGBA")
    see_through.putalpha(100)
    deep = Image.fromarray(np.zeros((5, 7), dtype=np.uint16))
    film = stored(picture("RGB"), "GIF", save_all=True, append_images=[picture("L").rotate(180)])
    return {
        "size": (
            stored(picture("RGB", (6, 5))),
            r"height × width 5 × 7, got 5 × 6; set data.shape to .channels, height, width.",
        ),
        "grey": (stored(picture("L")), r"3 × 5 × 7, got 1 × 5 × 7 \(mode L\)"),
        "transparent": (
            stored(see_through),
            r"got 4 × 5 × 7 \(mode RGBA with transparent pixels\)",
        ),
        "sixteen-bit": (stored(deep), r"bytes .*got mode I;16, 16 bit"),
        "animated": (film, "got an animation of 2"),
        "garbage": (b"not an image", "can be decoded, got 12 bytes"),
        "cut": (stored(picture("RGB"))[:60], "can be decoded, got 60 bytes"),
        "empty": (b"", "got none; remove the row"),
    }


@pytest.mark.parametrize("case", bad_images())
@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_does_not_fit_is_named(tmp_path, case, workers):
    data, message = bad_images()[case]
    images = [stored(picture("RGB"))] * 4
    write_parquet(tmp_path / "x.parquet", [*images, data], group=2)
    settings = {"val_split": None, "shape": (3, 5, 7), "on_bad_example": "raise"}
    loader = module(tmp_path / "x.parquet", num_workers=workers, **settings).train_dataloader()
    named = rf"^row 4 of \S+/x.parquet, split 'train': expected .*{message}"
    with pytest.raises(ValueError, match=named):
        take(loader, 4)
    write_parquet(tmp_path / "y.parquet", [data, *images])
    with pytest.raises(ValueError, match=named.replace("row 4", "row 0").replace("x.p", "y.p")):
        module(tmp_path / "y.parquet", **settings)


def one(tmp_path, **columns):
    write_parquet(tmp_path / "x.parquet", [encode(image) for image in pixels(2)], **columns)
    return tmp_path / "x.parquet"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_key": "img"}, "expected a column 'img' in split 'train', got image, label; set"),
        ({"label_key": "class"}, "expected a column 'class' .* set data.label_key; null for no"),
        ({"image_key": "label"}, "expected an image, got int; set data.image_key"),
        ({"val_split": "dev"}, "expected a split 'dev', got train; set data.train_split"),
        (
            {"shape": (3, 8, 8)},
            "width 3 × 8 × 8, got 1 × 8 × 8 .* set data.shape to .channels, height, width.",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("streaming", [True, False])
def test_wrong_names_and_shapes(tmp_path, arguments, message, streaming):
    path = one(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        module(path, streaming=streaming, **({"val_split": None} | arguments))
    assert "\n" not in str(caught.value)


def test_labels_must_be_integers(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected an integer label, got 'a'; set data.label_key"
    ):
        module(one(tmp_path, labels=["a", "b"]), val_split=None)


@pytest.mark.parametrize("streaming", [True, False])
def test_no_examples(tmp_path, streaming):
    write_parquet(tmp_path / "x.parquet", [])
    with pytest.raises(ValueError, match=r"expected examples in split 'train', got none|no data!"):
        module(tmp_path / "x.parquet", val_split=None, streaming=streaming)


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "nowhere.parquet", "~/nowhere"])
def test_missing_files(path):
    with pytest.raises(
        FileNotFoundError, match=r"expected a file or folder at .*, found none; set"
    ):
        module(path)


def test_other_bad_places(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"cannot be opened: .*contain any data files"):
        module(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"cannot be opened: .*nowhere"):
        module("parquet", data_files={"train": str(tmp_path / "nowhere.parquet")})
    write_parquet(tmp_path / "set" / "train.parquet", [])
    with pytest.raises(ValueError, match=r"cannot be opened: .*'other' not found. Available"):
        module(tmp_path / "set", config_name="other")
    (tmp_path / "x.txt").write_text("text")
    with pytest.raises(ValueError, match=r"expected a parquet, \.npy or \.npz file"):
        module(tmp_path / "x.txt")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing")
    broken = (
        r"expected a parquet file at \S+/broken.parquet, got ArrowInvalid: .*; repair or remove"
    )
    with pytest.raises(ValueError, match=broken):
        module(tmp_path / "broken.parquet")
    with pytest.raises(ValueError, match="cannot be opened: "):
        module(tmp_path / "broken.parquet", streaming=False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("Couldn't reach 'someone/something' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"neither a local path nor shipped \(digits8x8, digits_text, ellipses, "
        r"oscillations, swirl, toy1d\), and on",
    ):
        module("someone/something")


@pytest.mark.parametrize(
    "argument",
    [
        {"batch_size": 0},
        {"num_workers": -1},
        {"shape": (8, 8)},
        {"steps_per_epoch": 0},
        {"seed": -1},
        {"open_shards": 0},
        {"on_bad_example": "repair"},
        {"max_bad_share": 1.5},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_arguments_are_checked(argument):
    with pytest.raises(ValueError, match=f"data.{next(iter(argument))} must be .*, got"):
        DataModule(**argument)


# --- with Lightning


class Recorder(L.LightningModule):
    """Trains one number and writes down what it was given, and in which epoch."""

    def __init__(self, ask=False):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.ask = ask
        self.seen = []

    def training_step(self, batch, batch_idx):
        x = batch["image"]
        assert x.dtype == torch.float32
        self.seen.append((self.current_epoch, batch_idx, batch["label"].tolist(), x.sum().item()))
        return (self.weight - x.mean()) ** 2

    def validation_step(self, batch, batch_idx):
        assert batch["total"] == 10

    def configure_optimizers(self):
        if self.ask:
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Save(L.Callback):
    """Saves after each batch, and at the two ends of an epoch."""

    def on_train_batch_end(self, trainer, *args):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/batch-{trainer.global_step}.ckpt")

    def on_validation_end(self, trainer, *args):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/val-{trainer.global_step}.ckpt")

    def on_train_epoch_end(self, trainer, *args):
        trainer.save_checkpoint(f"{trainer.default_root_dir}/epoch-{trainer.global_step}.ckpt")


def fit(folder, root, steps, *, ckpt_path=None, ask=False, **arguments):
    recorder = Recorder(ask)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=100 if ask else None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[Save()] if ckpt_path is None else [],
        default_root_dir=root,
    )
    data = DataModule(path=str(folder), batch_size=8, horizontal_flip=True, **arguments)
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return recorder


@pytest.mark.parametrize("workers", [0, 2])
def test_a_lightning_run_continues_from_any_step(folder, tmp_path, workers):
    arguments = {"num_workers": workers, "streaming": workers == 0}
    whole = fit(folder, tmp_path, 17, **arguments)
    assert [epoch for epoch, *_ in whole.seen] == [0] * 7 + [1] * 7 + [2] * 3
    moments = [f"batch-{step}" for step in range(1, 17)] + ["val-7", "epoch-7", "epoch-14"]
    for moment in moments if workers == 0 else ("batch-5", "batch-7", "epoch-14"):
        path = tmp_path / f"{moment}.ckpt"
        resumed = fit(folder, tmp_path, 17, ckpt_path=path, **arguments)
        step = int(moment.split("-")[1])
        assert resumed.seen == whole.seen[step:], f"resumed at {moment}"
        assert torch.equal(resumed.weight, whole.weight)


def test_asking_for_the_number_of_steps_does_not_lose_the_place(folder, tmp_path):
    whole = fit(folder, tmp_path, 12)
    resumed = fit(folder, tmp_path, 12, ckpt_path=tmp_path / "batch-5.ckpt", ask=True)
    assert resumed.seen == whole.seen[5:]


def test_lightning_without_validation_data(folder, tmp_path):
    assert len(fit(folder, tmp_path, 3, val_split=None).seen) == 3


# --- a whole split


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("world", [1, 3])
def test_all_examples_of_a_split_come_once_in_order(folder, world, streaming):
    dealt = {}
    for rank in range(world):
        data = module(folder, (rank, world), "validate", streaming=streaming)
        for batch in data.examples("train", 7):
            assert batch["batch"] % world == rank
            dealt[batch["batch"]] = batch["label"]
    assert torch.cat([dealt[n] for n in range(9)]).tolist() == list(range(60))
