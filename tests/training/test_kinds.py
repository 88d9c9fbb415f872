"""Data of any kind: signals, volumes, sets of points, vectors, from storage to samples."""

import io
import math
import re
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lit_diffusion import DDIMSampler, Normalization, ResidualMLP, load_pretrained
from lit_diffusion.training import EMA, FID, DataModule, Likelihood, LitDiffusion
from lit_diffusion.training.callbacks.predictions import Predictions
from lit_diffusion.training.run.pictures import picture_of

KINDS = {
    "signal": (2, 5),
    "volume": (2, 3, 4, 5),
    "points": (3, 7),
    "vector": (4,),
    "latents": (2, 3),
}


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(folder, rows, split="train"):
    """A parquet file with a column `image` of lists or of bytes."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    parquet.write_table(pa.table({"image": rows}), folder / f"{split}.parquet", row_group_size=4)
    return folder


def examples(kind, n=12, seed=0):
    """Numbers in a unit of their own, each channel with another mean and scale."""
    shape = KINDS[kind]
    rng = np.random.default_rng(seed)
    unit = np.arange(1, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
    return (rng.standard_normal((n, *shape)) * unit + 10 * unit).astype(np.float32)


def stored(kind, arrays):
    """Points are lists of points."""
    return [(a.T if kind == "points" else a).tolist() for a in arrays]


def module(folder, kind, **arguments):
    settings = {"kind": kind, "shape": KINDS.get(kind), "label_key": None, "batch_size": 3}
    data = DataModule(str(folder), **(settings | {"val_split": None} | arguments))
    data.setup("fit")
    return data


def one_epoch(data, n):
    """What reaches the model, by the indices."""
    found = {}
    for batch in data.train_dataloader():
        moved = data.on_after_batch_transfer(batch, 0)
        found |= dict(zip(batch["index"].tolist(), moved["image"], strict=True))
    return torch.stack([found[i] for i in range(n)])


def over_examples(x):
    return [0, *range(2, x.ndim)]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_arrive_and_can_be_restored(tmp_path, alone, kind, streaming):
    arrays = examples(kind)
    data = module(write(tmp_path / "d", stored(kind, arrays)), kind, streaming=streaming)
    x = one_epoch(data, 12)
    if kind == "latents":
        assert data.normalization is None
        assert torch.equal(x, torch.from_numpy(arrays))
        return
    axes = over_examples(x)
    torch.testing.assert_close(x.mean(axes), torch.zeros(x.shape[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(axes, correction=0), torch.ones(x.shape[1]))
    torch.testing.assert_close(data.normalization.restore(x), torch.from_numpy(arrays))
    expected = arrays.astype(np.float64).mean(tuple(over_examples(arrays)))
    assert data.normalization.shift.numpy() == pytest.approx(expected, rel=1e-13)


def test_min_max_reaches_both_ends(tmp_path):
    arrays = examples("signal")
    data = module(write(tmp_path / "d", stored("signal", arrays)), "signal", normalize="min_max")
    x = one_epoch(data, 12)
    axes = over_examples(x)
    torch.testing.assert_close(x.amax(axes), torch.ones(2))
    torch.testing.assert_close(x.amin(axes), -torch.ones(2))


def test_a_constant_channel_is_said_and_not_scaled(tmp_path):
    arrays = examples("vector")
    arrays[:, 2] = 0.1
    data = module(write(tmp_path / "d", stored("vector", arrays)), "vector")
    with pytest.warns(UserWarning, match="channel 2 of the data is constant in split 'train'"):
        data.settle_normalization(None)
    x = one_epoch(data, 12)
    torch.testing.assert_close(x[:, 2], torch.zeros(12), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("signal", lambda a: npy(a)),
        ("signal", lambda a: npy(a.T)),
        ("points", lambda a: npy(a.T)),
        ("points", lambda a: npy(a)),
        ("volume", lambda a: npy(np.moveaxis(a, 0, -1).astype(np.float64))),
        ("latents", lambda a: npy(a)),
    ],
)
def test_encodings_of_one_array_are_undone(tmp_path, kind, change):
    arrays = examples(kind)
    data = module(write(tmp_path / "d", [change(a) for a in arrays]), kind, normalize=None)
    assert torch.equal(one_epoch(data, 12), torch.from_numpy(arrays))


def test_one_channel_needs_no_axis_and_integers_are_numbers(tmp_path):
    rows = [[i, i + 1, i + 2] for i in range(6)]
    data = module(write(tmp_path / "d", rows), "signal", shape=(1, 3), normalize=None)
    assert torch.equal(one_epoch(data, 6), torch.tensor(rows)[:, None].float())


def test_points_are_lists_of_points_even_if_there_are_as_many_as_numbers(tmp_path):
    square = np.arange(12.0).reshape(3, 2, 2)
    data = module(write(tmp_path / "d", square.tolist()), "points", shape=(2, 2), normalize=None)
    assert torch.equal(one_epoch(data, 3), torch.from_numpy(square).float().mT)


def test_arrays_may_be_files(tmp_path):
    arrays = examples("points")
    np.save(tmp_path / "x.npy", arrays.transpose(0, 2, 1))
    data = module(tmp_path / "x.npy", "points", normalize=None)
    assert torch.equal(one_epoch(data, 12), torch.from_numpy(arrays))
    (tmp_path / "each").mkdir()
    for i, array in enumerate(arrays):
        np.save(tmp_path / "each" / f"{i:02d}.npy", array.T)
    data = module(tmp_path / "each", "points", normalize=None)
    assert torch.equal(one_epoch(data, 12), torch.from_numpy(arrays))


# What does not fit -----------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ([[1.0] * 5, [float("nan")] * 5], "finite numbers, got NaN"),
        ([[1.0] * 4, [1.0] * 4], "of data.kind signal and shape 2 × 5, got 2 × 4; set data.shape"),
        ([[1.0] * 5, [1.0] * 4], "lists of uneven lengths"),
        ([[1.0] * 5, [None] * 5], "a missing value among them"),
        (None, "got none; remove the row"),
    ],
)
@pytest.mark.filterwarnings("ignore:skipped example 5")
def test_a_bad_example_has_a_reason(tmp_path, alone, bad, reason, streaming):
    rows = stored("signal", examples("signal"))
    rows[5] = bad
    folder = write(tmp_path / "d", rows)

    def read():
        data = module(folder, "signal", streaming=streaming, on_bad_example="raise", batch_size=12)
        next(iter(data.train_dataloader()))

    with pytest.raises(ValueError, match=reason) as error:
        read()
    assert re.search("(row|example) 5", str(error.value))
    data = module(folder, "signal", streaming=streaming, max_bad_share=0.2)
    data.settle_normalization(None)
    good = np.delete(examples("signal"), 5, 0).astype(np.float64)
    assert data.normalization.shift.numpy() == pytest.approx(good.mean((0, 2)), rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"kind": "signal", "shape": (1, 8, 8)}, r"\(channels, length\).*data.kind image"),
        (
            {"kind": "image", "shape": (1, 8)},
            "with data.kind image; .* data.kind signal or points",
        ),
        ({"kind": "vector", "shape": (3, 8)}, r"\(numbers,\).*data.kind signal or points"),
        ({"kind": "sound", "shape": (3, 8)}, "must be one of image, signal"),
        ({"kind": "signal", "shape": (1, 8), "normalize": "std"}, "must be auto, mean_std"),
        (
            {"kind": "signal", "shape": (1, 8), "horizontal_flip": True},
            "horizontal_flip is for pi",
        ),
        ({"kind": "signal", "shape": (1, 8), "mode": "L"}, "data.mode is for pictures"),
        ({"kind": "volume", "shape": (1, 8, 8, 8), "transform": ["Fit"]}, "data.transform is for"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        DataModule("digits8x8", **arguments)


def test_the_wrong_kind_names_the_right_line(tmp_path):
    with pytest.raises(ValueError, match=r"set data.kind to image if these are pictures"):
        module("digits8x8", "signal", shape=(1, 64))
    folder = write(tmp_path / "d", [[[0.5] * 8] * 8] * 3)
    with pytest.raises(ValueError, match=r"set data.kind to what these numbers are: signal"):
        module(folder, "image", shape=(1, 8, 8))


def test_images_of_floats_may_be_normalised_and_bytes_not(tmp_path):
    pixels = np.random.default_rng(0).random((6, 1, 4, 4), dtype=np.float32)
    folder = write(tmp_path / "d", [npy(a) for a in pixels])
    x = one_epoch(module(folder, "image", shape=(1, 4, 4), normalize="min_max"), 6)
    assert (float(x.min()), float(x.max())) == pytest.approx((-1, 1), abs=1e-6)
    with pytest.raises(ValueError, match=r"these are bytes, which always become \[−1, 1\]"):
        module("digits8x8", "image", shape=(1, 8, 8), normalize="mean_std")


# The model keeps it ----------------------------------------------------------------------------


def model_for(shape, **arguments):
    return LitDiffusion(
        ResidualMLP(shape=shape, features=8, layers=1),
        sampler=DDIMSampler(steps=2),
        clip_denoised=False,
        **arguments,
    )


def trainer(folder, **arguments):
    settings = {"max_steps": 2, "limit_val_batches": 1, "accelerator": "cpu", "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(default_root_dir=folder, **(settings | arguments))


@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_and_an_evaluation_keep_the_normalisation(tmp_path):
    write(tmp_path / "a", stored("vector", examples("vector")))
    write(tmp_path / "a", stored("vector", examples("vector", seed=1)), "test")
    other = write(tmp_path / "b", stored("vector", 3 * examples("vector", seed=2)))
    write(tmp_path / "b", stored("vector", examples("vector", seed=1)), "test")
    settings = {"kind": "vector", "shape": (4,), "label_key": None, "batch_size": 4}
    model, first = model_for((4,)), trainer(tmp_path, callbacks=[EMA(0.9)])
    first.fit(model, DataModule(str(tmp_path / "a"), **settings))
    path = tmp_path / "a.ckpt"
    first.save_checkpoint(path)
    kept = model.normalization
    assert kept.shift.numpy() == pytest.approx(
        examples("vector").astype(np.float64).mean(0), rel=1e-13
    )
    loaded = LitDiffusion.load_from_checkpoint(path)
    assert (loaded.kind, loaded.normalization) == ("vector", kept)

    resumed = model_for((4,))
    changed = DataModule(str(other), on_changed_data="continue", **settings)
    trainer(tmp_path, max_steps=4, callbacks=[EMA(0.9)]).fit(resumed, changed, ckpt_path=path)
    assert resumed.normalization == changed.normalization == kept
    evaluated = DataModule(str(other), **settings)
    trainer(tmp_path).validate(loaded, evaluated, verbose=False)
    assert evaluated.normalization == kept

    plain = DataModule(str(other), normalize=None, **settings)
    with pytest.raises(ValueError, match=r"data.normalize null; leave it out"):
        trainer(tmp_path).validate(loaded, plain, verbose=False)
    plain = DataModule(str(other), **(settings | {"kind": "latents"}))
    with pytest.raises(ValueError, match=r"expected data of kind vector.*got data.kind latents"):
        trainer(tmp_path).validate(loaded, plain, verbose=False)
    squeezed = DataModule(str(tmp_path / "a"), normalize="min_max", **settings)
    again = trainer(tmp_path, max_steps=6, callbacks=[EMA(0.9)])
    with pytest.raises(ValueError, match=r"data.normalize was mean_std .* is min_max"):
        again.fit(model_for((4,)), squeezed, ckpt_path=path)


@pytest.mark.filterwarnings("ignore")
def test_fid_is_of_images(tmp_path):
    folder = write(tmp_path / "d", stored("vector", examples("vector")))
    data = DataModule(str(folder), kind="vector", shape=(4,), label_key=None, val_split=None)
    with pytest.raises(ValueError, match=r"got data.kind vector: measure the bound instead"):
        trainer(tmp_path, callbacks=[FID(4)]).fit(model_for((4,)), data)


def test_the_bound_is_in_the_unit_of_the_data():
    """A density in units a thousand times as large is a thousand times as high."""
    model, batch = model_for((4,)), {"image": torch.randn(6, 4)}
    model.set_about_data({"kind": "vector"})
    callback = Likelihood()
    plain = callback.bound(model, batch)
    scale = [1e-3, 1e-3, 1e-3, 1.0]
    model.normalization = Normalization(shift=[1.0, 2.0, 3.0, 4.0], scale=scale)
    scaled = callback.bound(model, batch)
    expected = plain.total + math.log(1e-3) * 3 / 4
    torch.testing.assert_close(scaled.total, expected)
    assert type(callback.settings(model).decoder).__name__ == "GaussianDecoder"


def test_predictions_of_one_channel_are_numbers_and_not_pictures(tmp_path):
    model = LitDiffusion(network=ResidualMLP(shape=(1, 5), features=8))
    model.kind, model.normalization = "signal", Normalization([10.0], [2.0])
    x = torch.randn(2, 1, 5)
    writer = Predictions(str(tmp_path / "out"))
    writer.on_predict_start(L.Trainer(default_root_dir=tmp_path, logger=False), model)
    model.numbered = lambda batch: {"index": torch.tensor([3, 1])}
    writer.on_predict_batch_end(None, model, x, {}, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "000001.npy",
        "000003.npy",
    ]
    written = np.load(tmp_path / "out" / "000003.npy")
    assert np.allclose(written, 2 * x[0].numpy() + 10)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_from_the_command_line_to_samples_in_the_unit_of_the_data(cli, tmp_path):
    arrays = examples("signal", 64)
    folder = write(tmp_path / "d", stored("signal", arrays))
    write(tmp_path / "d", stored("signal", examples("signal", 16, 1)), "test")
    data = ["--data.path", folder, "--data.kind=signal", "--data.shape=[2,5]"]
    data += ["--data.label_key=null", "--data.batch_size=16"]
    code, out, err = cli(
        "fit", *data, "--model.network=ResidualMLP", "--model.network.features=16",
        "--model.clip_denoised=false", "--model.sampler=DDIMSampler", "--model.sampler.steps=10",
        "--trainer.max_steps=20", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false",
        "--trainer.callbacks+=Likelihood",
    )  # fmt: skip
    assert code == 0, err
    assert "normalised by 64 training examples" in err + out
    assert cli("sample", "--ckpt_path=last", "--num_samples=9", "--out=x.npy")[0] == 0
    samples = np.load("x.npy")
    assert samples.shape == (9, 2, 5)
    assert samples.mean((0, 2)) == pytest.approx([10, 20], rel=0.3)  # not 0
    assert cli("sample", "--ckpt_path=last", "--num_samples=9", "--out=x.png")[0] == 0
    shown = np.asarray(Image.open("x.png").convert("RGB"))
    assert np.array_equal(
        shown, picture_of(torch.from_numpy(samples), 3, "signal").permute(1, 2, 0)
    )
    code, out, err = cli("predict", *data, "--ckpt_path=last", "--trainer.accelerator=cpu")
    assert code == 0, err
    (predicted,) = Path("runs").rglob("predicted")
    found = np.stack([np.load(path) for path in sorted(predicted.iterdir())])
    assert found.shape == (16, 2, 5)
    assert found.mean((0, 2)) == pytest.approx([10, 20], rel=0.3)
    code, _, err = cli("sample", "--ckpt_path=last", "--num_samples=9", "--out=x")
    assert code == 2
    assert "kind signal cannot be written as images: give a .npy file" in err
    code, out, err = cli("export", "last", "--out", "exported")
    assert code == 0, err
    exported = load_pretrained("exported")
    expected = arrays.astype(np.float64).mean((0, 2))
    assert exported.kind == "signal"
    card = Path("exported/README.md").read_text()
    assert "x = model.restored(x)  # in the unit of the data" in card
    assert "[−1, 1]" not in card
    assert "pipeline_tag" not in card
    assert exported.normalization.shift.numpy() == pytest.approx(expected, rel=1e-13)
    code, out, err = cli("evaluate", "--ckpt_path=last")
    assert code == 2
    assert "got data.kind signal: measure the bound instead" in err
