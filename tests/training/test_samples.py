"""Samples in files: written as they are made, continued, and under real conditions."""

import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import encode, pixels, write_parquet
from PIL import Image
from test_fid import Flat
from test_own_data import Plain, trainer

import lit_diffusion as ld
from lit_diffusion.nn import UNet
from lit_diffusion.training import (
    FID,
    DataModule,
    LitDiffusion,
    Predictions,
    evaluate,
    sample,
)
from lit_diffusion.training.evaluation.generation import to_bytes
from lit_diffusion.training.evaluation.row_conditions import RowConditions

SHAPE = (1, 8, 8)


def saved(model, path="x.ckpt"):
    run = trainer(Path.cwd())
    run.strategy.connect(model)
    run.save_checkpoint(path)
    return model.eval()


@pytest.fixture
def plain(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    return saved(LitDiffusion(UNet(channels=(8,), attention=()), sampler=ld.DDIMSampler(steps=2)))


def read(out):
    """The samples in a file or a folder, by their number."""
    if Path(out).suffix == ".npy":
        return dict(enumerate(np.load(out)))
    return {int(path.stem): path.read_bytes() for path in Path(out).rglob("*.png")}


def drawn(out, n=8, **arguments):
    return sample("x.ckpt", num_samples=n, batch_size=3, out=out, device="cpu", **arguments)


class PowerCutError(Exception):
    """A power cut."""


def stopping(monkeypatch, batches):
    """Count the batches that are sampled, and stop after some."""
    count, before = [], LitDiffusion.sample

    def counted(self, *args, **kwargs):
        if len(count) == batches:
            raise PowerCutError
        count.append(args[0])
        return before(self, *args, **kwargs)

    monkeypatch.setattr(LitDiffusion, "sample", counted)
    return count


@pytest.mark.parametrize("out", ["folder", "array.npy"])
def test_a_command_that_was_stopped_goes_on(plain, monkeypatch, out):
    drawn("whole" if out == "folder" else "whole.npy")
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(PowerCutError):
            drawn(out)
    there = Path(out) if out == "folder" else Path(f"{out}.part")
    assert there.exists()
    assert out == "folder" or not Path(out).exists()  # its name stands for all of it
    assert out != "folder" or len(read(out)) == 6
    count = stopping(monkeypatch, 9)
    drawn(out)
    assert count == [2]  # the last batch alone
    found, expected = read(out), read("whole" if out == "folder" else "whole.npy")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[i], expected[i]) for i in found)
    assert not list(Path.cwd().glob("*.part*"))


def test_an_image_that_is_half_written_is_made_again(plain, monkeypatch):
    drawn("folder")
    Path("folder/.000007.png.1.tmp").write_bytes(b"half")
    Path("folder/000007.png").unlink()
    count = stopping(monkeypatch, 9)
    drawn("folder")
    assert count == [2]
    assert len(read("folder")) == 8
    assert not list(Path("folder").glob(".*"))


@pytest.mark.parametrize("out", ["folder", "array.npy"])
def test_another_size_goes_on_and_is_not_mixed_with_the_trained_one(plain, monkeypatch, out):
    drawn("whole.npy", size="12x16")
    with monkeypatch.context() as patch:
        stopping(patch, 2)
        with pytest.raises(PowerCutError):
            drawn(out, size="12x16")
    with pytest.raises(ValueError, match="got another size"):
        drawn(out)
    count = stopping(monkeypatch, 9)
    drawn(out, size=[12, 16])
    assert count == [2]
    found, expected = read(out), np.load("whole.npy")
    assert expected.shape == (8, 1, 12, 16)
    for i, one in enumerate(expected):
        if out == "folder":
            grey = np.array(Image.open(f"folder/{i:06d}.png"))
            assert np.array_equal(grey, to_bytes(torch.from_numpy(one))[0].numpy())
        else:
            assert np.array_equal(found[i], one)


def test_the_size_of_training_is_no_other_size(plain):
    drawn("no.npy")
    drawn("same.npy", size="8x8")
    assert Path("no.npy").read_bytes() == Path("same.npy").read_bytes()
    drawn("folder", 3, size="8x8")
    drawn("folder")  # continues it
    assert len(read("folder")) == 8


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ("8", r"size of 2 positive sides, such as 8x8, .*got 8\.$"),
        ("8x8x8", "got 8x8x8"),
        ("0x8", "got 0x8"),
        ("8by8", "such as 48x64, got '8by8'"),
    ],
)
def test_sizes_that_are_none_are_refused(plain, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        drawn("folder", size=size)
    assert not Path("folder").exists()


def test_more_samples_are_added(plain, monkeypatch):
    drawn("folder", 3)
    count = stopping(monkeypatch, 9)
    drawn("folder", 8)
    assert count == [3, 2]


@pytest.mark.parametrize("out", ["folder", "array.npy"])
def test_samples_of_another_command_are_neither_continued_nor_overwritten(plain, monkeypatch, out):
    with monkeypatch.context() as patch:
        stopping(patch, 1)
        with pytest.raises(PowerCutError):
            drawn(out)
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    for other in ({"seed": 1}, {"sampler": ld.DDIMSampler(steps=3)}):
        with pytest.raises(ValueError, match=f"got another {next(iter(other))}"):
            drawn(out, **other)
    saved(LitDiffusion(UNet(channels=(8,), attention=(), blocks=1)), "x.ckpt")
    with pytest.raises(ValueError, match="got another weights"):
        drawn(out, sampler=plain.sampler)
    del before[Path.cwd() / "x.ckpt"]
    assert all(path.read_bytes() == content for path, content in before.items())


def test_images_of_another_program_are_not_overwritten(plain):
    Path("folder").mkdir()
    Path("folder/000000.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match="made by another program"):
        drawn("folder")
    assert Path("folder/000000.png").read_bytes() == b"mine"


@pytest.mark.slow
def test_the_memory_is_that_of_one_batch(plain, monkeypatch):
    alive, before = [], LitDiffusion.sample

    def watched(self, *args, **kwargs):
        gc.collect()
        alive.append(sum(t is not None for t in (r() for r in made)))
        images = before(self, *args, **kwargs).clone()
        made.append(weakref.ref(images))
        return images

    made = []
    monkeypatch.setattr(LitDiffusion, "sample", watched)
    for out in ("folder", "array.npy"):
        made.clear()
        drawn(out, 12)
    assert max(alive) <= 1


# Under the conditions of examples -------------------------------------------------------------


class Tinted(Plain):
    """A network whose output is its condition and its label, so that a sample tells both."""

    conditions = ("age",)
    num_classes = 4
    shape = SHAPE

    def forward(self, z, logsnr, label=None, age=None, dropped=None):
        x = (age / 20 + label / 100)[:, None, None, None] * self.scale
        return x.expand_as(z).to(z.dtype)


def tinted_data(folder, **arguments):
    return DataModule(str(folder), shape=SHAPE, condition_keys=("age",), batch_size=4, **arguments)


AGE, LABEL = [(i * 7) % 11 for i in range(10)], [i % 4 for i in range(10)]
TINT = torch.tensor(AGE) / 20 + torch.tensor(LABEL) / 100


@pytest.fixture
def tinted(tmp_path, monkeypatch):
    from lit_diffusion import description

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(description, "_ALLOWED", [*description._ALLOWED, __name__])
    folder = tmp_path / "data"
    folder.mkdir()
    images = [encode(image) for image in pixels(10, SHAPE)]
    for split in ("train", "test"):
        path = folder / f"{split}-00000-of-00001.parquet"
        write_parquet(path, images, LABEL, age=AGE)
    model = LitDiffusion(
        Tinted(), prediction=ld.XPrediction(), sampler=ld.DDIMSampler(steps=2), conditions=("age",)
    )
    Path("c.yaml").write_text(f"data: {{path: {folder}, shape: [1, 8, 8], condition_keys: [age]}}")
    return saved(model), folder


def test_sample_takes_conditions_from_the_examples_of_its_config(tinted, cli):
    found = drawn("array.npy", config="c.yaml").images
    torch.testing.assert_close(found.mean((1, 2, 3)), TINT[:8], atol=1e-3, rtol=0)
    other = drawn("other.npy", config="c.yaml", label=0).images  # the class is chosen
    expected = torch.tensor(AGE[:8]) / 20
    torch.testing.assert_close(other.mean((1, 2, 3)), expected, atol=1e-3, rtol=0)
    for words, message in (
        (["--num_samples=11", "--config=c.yaml"], "at most 10 samples"),
        (["--num_samples=2"], "does not record its data"),
        (["--num_samples=2", "--config=c.yaml", "--split=val"], "'val'"),
    ):
        code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--out=array.npy", *words)
        assert code == 2
        assert message in err


def test_sample_without_conditions_refuses_data(plain):
    with pytest.raises(ValueError, match="omit --config and --split"):
        drawn("folder", split="test")


def test_scores_are_of_samples_under_the_conditions_of_training_examples(tinted, monkeypatch):
    _, folder = tinted
    seen = []
    before = LitDiffusion.sample

    def watched(self, *args, **kwargs):
        seen.append(before(self, *args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(LitDiffusion, "sample", watched)
    data = tinted_data(folder)
    found = evaluate(
        "x.ckpt", data=data, num_samples=10, batch_size=4, bound=False, out="e",
        features=Flat(), split="test", device="cpu",
    )  # fmt: skip
    tints = torch.cat(seen).mean((1, 2, 3))
    torch.testing.assert_close(tints, TINT, atol=1e-3, rtol=0)
    assert "age" in found.rows[0].protocol["classes"]
    run = trainer(Path.cwd(), callbacks=[FID(11, Flat(), "test")])
    with pytest.raises(ValueError, match="at most 10 samples"):
        run.fit(LitDiffusion(Tinted(), conditions=("age",)), tinted_data(folder))
    assert run.global_step == 0


def test_ranks_share_the_examples(tinted, monkeypatch):
    model, folder = tinted
    found = {}
    for rank in range(2):
        monkeypatch.setattr(DataModule, "_place", lambda self, rank=rank: (rank, 2))
        rows = RowConditions(model, tinted_data(folder), "train", 4)
        found |= {
            number: rows(number, 4)["age"].flatten().tolist() for number in range(rank, 3, 2)
        }
    assert [age for i in range(3) for age in found[i]][:10] == AGE


# By predict -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 8, 8), (4, 8, 8)], ids=["images", "latents"])
def test_predict_writes_each_sample_by_the_number_of_its_example(tmp_path, monkeypatch, shape):
    monkeypatch.chdir(tmp_path)
    model = LitDiffusion(Plain(), sampler=ld.DDIMSampler(steps=2), shape=shape)
    loader = [
        {"image": torch.zeros(2, *shape), "index": torch.tensor(i)} for i in ((4, 2), (9, 0))
    ]
    run = trainer(tmp_path, callbacks=[Predictions("kept")])
    made = torch.cat(run.predict(model, iter(loader)))
    for i, x in zip((4, 2, 9, 0), made, strict=True):
        if shape[0] == 4:
            assert np.array_equal(np.load(f"kept/{i:06d}.npy"), x.numpy())
        else:
            levels = np.array(Image.open(f"kept/{i:06d}.png"))
            assert np.array_equal(levels, to_bytes(x)[0].numpy())
    assert len(list(Path("kept").iterdir())) == 4
