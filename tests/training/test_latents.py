"""Latents: a data set of floats, made of images by an autoencoder, trained on, and decoded."""

import importlib.util
import io
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lit_diffusion.nn import bytes_text
from lit_diffusion.training import DataModule, LitDiffusion
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.run.whole_file import unfinished_path

CONFIG = Path(__file__).parents[2] / "configs" / "imagenet256-latent.yaml"
SHAPE = (4, 6, 2)  # channels, height and width all differ
needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="needs diffusers: pip install 'lit-diffusion[diffusers]'",
)


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(folder, arrays, split="train", **columns):
    """A parquet file with a column `latent`."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(exist_ok=True)
    table = pa.table({"latent": [npy(a) for a in arrays]} | columns)
    parquet.write_table(table, folder / f"{split}.parquet", row_group_size=4)
    return folder


def latents(n, dtype=np.float16, seed=0):
    return (2 * np.random.default_rng(seed).standard_normal((n, *SHAPE))).astype(dtype)


def module(folder, **arguments):
    settings = {"shape": SHAPE, "image_key": "latent", "label_key": None, "batch_size": 3}
    settings |= {"val_split": None} | arguments
    data = DataModule(str(folder), **settings)
    data.setup("fit")
    return data


def one_epoch(data, n):
    """The images by their indices, as they reach the model."""
    found = {}
    for batch in data.train_dataloader():
        moved = data.on_after_batch_transfer(batch, 0)
        found |= dict(zip(batch["index"].tolist(), moved["image"], strict=True))
    assert sorted(found) == list(range(n))
    return torch.stack([found[i] for i in range(n)])


# Floats as data --------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_floats_arrive_as_they_are(tmp_path, alone, dtype, streaming, workers):
    stored = latents(12, dtype)
    data = module(write(tmp_path / "d", stored), streaming=streaming, num_workers=workers)
    images = one_epoch(data, 12)
    assert images.dtype == torch.float32
    assert torch.equal(images, torch.from_numpy(stored.astype(np.float32)))
    first = next(iter(data.train_dataloader()))
    assert first["image"].numpy().dtype == dtype  # half the bytes up to the device
    data.teardown("fit")


def test_float64_becomes_float32_and_any_byte_order_and_layout_will_do(tmp_path):
    stored = latents(3, np.float64)
    kinds = [stored[0], np.asfortranarray(stored[1]), stored[2].astype(">f8")]
    data = module(write(tmp_path / "d", kinds))
    assert torch.equal(one_epoch(data, 3), torch.from_numpy(stored).float())


def test_integers_in_an_array_are_an_image(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, *SHAPE), dtype=np.uint8)
    images = one_epoch(module(write(tmp_path / "d", pixels), batch_size=2), 4)
    torch.testing.assert_close(images, torch.from_numpy(pixels) / 127.5 - 1)


def test_validation_has_them_too(tmp_path):
    write(tmp_path / "d", latents(6))
    write(tmp_path / "d", latents(5, seed=1), "test")
    data = module(tmp_path / "d", val_split="test")
    seen = torch.cat([data.on_after_batch_transfer(b, 0)["image"] for b in data.val_dataloader()])
    assert torch.equal(seen, torch.from_numpy(latents(5, seed=1)).float())


def nan(array):
    array = array.copy()
    array[1, 2, 1] = np.nan
    return array


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (
            lambda a: a[:, :5],
            "an array of channels × height × width 4 × 6 × 2, got 4 × 5",
        ),
        (lambda a: a.transpose(1, 2, 0), "4 × 6 × 2, got 6 × 2 × 4"),
        (nan, "expected finite numbers"),
        (lambda a: a.astype(np.float32), "float16 as the first one's, got float32"),
        (lambda a: np.zeros(SHAPE, np.uint8), "float16 as the first one's, got uint8"),
        (
            lambda a: np.array([{"a": 1}]),
            "array of numbers, got object",
        ),  # a pickle, which is not opened
    ],
)
@pytest.mark.parametrize("streaming", [True, False])
def test_what_does_not_fit_is_named(tmp_path, alone, bad, reason, streaming):
    rows = list(latents(9))
    rows[5] = bad(rows[5])
    folder = write(tmp_path / "d", rows)

    def read():
        data = module(folder, streaming=streaming, on_bad_example="raise", batch_size=9)
        next(iter(data.train_dataloader()))

    with pytest.raises(ValueError, match=reason) as error:
        read()
    assert re.search("(row|example) 5", str(error.value))


def test_both_splits_are_alike(tmp_path):
    write(tmp_path / "d", latents(6))
    write(tmp_path / "d", latents(5, np.float32), "test")
    with pytest.raises(ValueError, match="float16 as the first one's, got float32"):
        module(tmp_path / "d", val_split="test")


def test_to_mirror_them_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.horizontal_flip mirrors images.*set it to false"):
        module(write(tmp_path / "d", latents(6)), horizontal_flip=True)


def test_a_grid_of_latents_shows_three_channels(tmp_path):
    x = torch.zeros(2, 5, 64, 64)
    x[0, 0], x[0, 1], x[0, 2], x[0, 3] = -3.0, 1.5, 30.0, 30.0
    picture = save_grid(x, tmp_path / "grid.png", columns=2)
    assert picture[:, 10, 10].tolist() == [0, 191, 255]
    with Image.open(tmp_path / "grid.png") as image:
        assert image.mode == "RGB"
    assert save_grid(x[:, 2:4], tmp_path / "grid.png", 2)[:, 10, 10].tolist() == [255] * 3


# From images to latents and back ---------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A small autoencoder of diffusers, that halves images once."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    made = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8], latent_channels=4, norm_num_groups=2, layers_per_block=1,
        scaling_factor=7.0, shift_factor=0.25,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder, made.eval()


def encode(cli, vae, rgb, out="latents", *further):
    words = ["--vae", vae[0], "--data.path", rgb, "--data.image_key", "img", "--out", out]
    return cli("encode", *words, "--data.shape", "[3,32,32]", "--batch_size", 5, *further)


def pixels(rgb, split):
    import datasets

    rows = datasets.Dataset.from_parquet(str(rgb / f"{split}.parquet"))
    x = torch.stack([torch.from_numpy(np.asarray(row["img"])).movedim(2, 0) for row in rows])
    return x.float() / 127.5 - 1, rows["label"]


@needs_diffusers
@pytest.mark.filterwarnings("ignore")
def test_conditions_and_captions_stay_beside_their_latent(cli, vae, rgb, tmp_path):
    import datasets

    rows = datasets.Dataset.from_parquet(str(rgb / "test.parquet"))
    rows = rows.add_column("said", [f"é {i}" for i in range(8)])
    rows = rows.add_column("angle", [[i, 0.5] for i in range(8)])
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / "told" / f"{split}.parquet")
    told = ("--data.text_key=said", "--data.condition_keys=[angle]")
    code, _, err = encode(cli, vae, tmp_path / "told", "latents", "--mirrored=true", *told)
    assert code == 0, err
    settings = {"shape": (4, 16, 16), "text_key": "said", "condition_keys": ("angle",)}
    data = module("latents", label_key="label", text_length=8, **settings)
    (batch,) = data.examples("train", 50)
    assert bytes_text(batch["text"]) == [f"é {i}" for i in range(8) for _ in "ab"]
    assert batch["angle"].tolist() == [[i, 0.5] for i in range(8) for _ in "ab"]
    assert batch["label"].tolist() == [label for label in rows["label"] for _ in "ab"]
    renamed = rows.rename_column("said", "latent")
    renamed.to_parquet(tmp_path / "named" / "train.parquet")
    further = ("--data.text_key=latent", "--data.val_split=null")
    code, _, err = encode(cli, vae, tmp_path / "named", "other", *further)
    assert code == 2
    assert "the result has a column 'latent' of its own" in err


@needs_diffusers
@pytest.mark.filterwarnings("ignore")
def test_encoded_trained_sampled_and_decoded(cli, vae, rgb):
    code, out, err = encode(cli, vae, rgb, "latents", "--mirrored", "true")
    assert code == 0, err
    assert out.strip() == "latents"
    assert {path.name for path in Path().iterdir()} == {"latents"}

    # What is stored is what the autoencoder says.
    settings = {"label_key": "label", "val_split": "test", "shape": (4, 16, 16)}
    data = module("latents", **settings)
    batches = list(data.examples("train", 50))
    with torch.no_grad():
        x, labels = pixels(rgb, "train")
        expected = 7 * (vae[1].encode(x).latent_dist.mean - 0.25)
        mirrored = 7 * (vae[1].encode(x.flip(3)).latent_dist.mean - 0.25)
    stored = batches[0]["image"].float()
    torch.testing.assert_close(stored[::2], expected, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(stored[1::2], mirrored, rtol=2e-3, atol=2e-3)
    assert batches[0]["label"].tolist() == [label for label in labels for _ in "ab"]
    (held_out,) = data.examples("test", 50)
    assert len(held_out["image"]) == 8  # not mirrored
    card = Path("latents/README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    card = yaml.safe_load(card)
    assert (card["scale"], card["shift"], card["latent_shape"]) == (7.0, 0.25, [4, 16, 16])
    assert card["splits"]["train"]["examples"] == 48
    moments = card["splits"]["train"]
    channels = stored.transpose(0, 1).flatten(1)
    torch.testing.assert_close(torch.tensor(moments["mean"]), channels.mean(1), atol=2e-4, rtol=0)
    torch.testing.assert_close(
        torch.tensor(moments["std"]), channels.std(1, correction=0), atol=2e-4, rtol=0
    )

    # The config trains on them.
    code, out, err = cli(
        "fit", "--config", CONFIG, "--data.path=latents", "--data.val_split=test",
        "--data.shape=[4,16,16]", "--data.num_workers=0", "--data.batch_size=4",
        "--data.steps_per_epoch=2", "--trainer.max_steps=2", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--model.network.depth=1",
        "--model.network.width=32", "--model.network.heads=2", "--model.sampler.steps=2",
    )  # fmt: skip
    assert code == 0, err
    folder = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    assert list(folder.glob("samples/*.png"))
    model = LitDiffusion.load_from_checkpoint(folder / "checkpoints" / "last.ckpt")
    network = model.denoiser.network
    assert (type(network).__name__, network.shape) == ("DiT", (4, 16, 16))
    assert (network.depth, network.qk_norm, network.num_classes) == (1, True, 1000)
    assert not model.clip_denoised

    code, _, err = cli("evaluate", "--ckpt_path", "last", "--features", "ClassifierFeatures")
    assert code == 2
    assert "decode latents into images first" in err

    # Samples are numbers, which are decoded.
    words = ["sample", "--ckpt_path", "last", "--num_samples", 5, "--batch_size", 2]
    code, _, err = cli(*words, "--out", "folder")
    assert code == 2
    assert "give a .npy file as --out" in err
    assert cli(*words, "--out", "deep/samples.npy")[0] == 0
    drawn = np.load("deep/samples.npy")
    assert (drawn.shape, drawn.dtype) == ((5, 4, 16, 16), np.float32)
    assert np.abs(drawn).max() > 1
    words = ["decode", "deep/samples.npy", "--vae", vae[0], "--batch_size", 2, "--out"]
    for out in ("images", "grid.png"):
        code, said, err = cli(*words, out)
        assert code == 0, err
        assert said.strip() == out
    with torch.no_grad():
        image = vae[1].decode(torch.from_numpy(drawn[3:4]) / 7 + 0.25).sample[0]
    expected = ((image.clamp(-1, 1) + 1) * 127.5).movedim(0, 2)
    assert sorted(path.name for path in Path("images").glob("*.png"))[-1] == "000004.png"
    with Image.open("images/000003.png") as picture:
        off = torch.from_numpy(np.asarray(picture)).float() - expected
    assert off.abs().max() <= 1
    with Image.open("grid.png") as grid:
        assert grid.size[0] > 2 * 32


@needs_diffusers
@pytest.mark.filterwarnings("ignore")
def test_a_failure_leaves_nothing_and_the_next_begins_anew(cli, vae, rgb, monkeypatch):
    from pyarrow import parquet

    # What a process left that was killed; no process has so large an id.
    mine = unfinished_path(Path("latents")).name
    left = Path(mine.replace(f".{os.getpid()}.", ".999999999."))
    left.mkdir()
    (left / "train-00000.parquet").write_bytes(b"half")

    def full(*words, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(parquet, "write_table", full)
        code, _, err = encode(cli, vae, rgb)
    assert code == 2
    assert "No space left" in err
    assert not list(Path().iterdir())
    code, _, err = encode(cli, vae, rgb, "latents", "--data.label_key", "null")
    assert code == 0, err
    data = module("latents", shape=(4, 16, 16))
    assert len(data.train_dataloader()) == 24 // 3


@needs_diffusers
@pytest.mark.filterwarnings("ignore")
def test_a_flipped_bit_of_a_latent_is_noticed(cli, vae, rgb, alone):
    assert encode(cli, vae, rgb)[0] == 0
    arguments = {"label_key": "label", "val_split": "test", "shape": (4, 16, 16)}
    before = [one["image"] for one in module("latents", **arguments).examples("train", 24)]
    path = Path("latents/train-00000.parquet")
    whole = bytearray(path.read_bytes())
    whole[whole.index(before[0][0].numpy().tobytes())] ^= 1
    path.write_bytes(whole)
    with pytest.raises(ValueError, match=r"[Cc]hecksum|CRC"):
        list(module("latents", **arguments).examples("train", 24))


def test_mistakes_are_one_line(cli, vae, rgb, tmp_path):
    def refused(code, out, err):
        assert code == 2
        assert not out
        lines = [line for line in err.splitlines() if "error:" in line]
        assert len(lines) == 1
        return lines[0]

    (tmp_path / "there").mkdir()
    assert "exists already" in refused(*encode(cli, vae, rgb, "there"))
    line = refused(*encode(cli, vae, rgb, "new", "--data.shape", "[3,33,32]"))
    assert "multiples of 2, got (3, 33, 32)" in line
    assert "3 channels" in refused(*encode(cli, vae, rgb, "new", "--data.shape", "[1,8,8]"))
    assert "--batch_size must be at least 1" in refused(
        *encode(cli, vae, rgb, "n", "--batch_size=0")
    )
    assert not Path("new").exists()
    refused(*encode(cli, (tmp_path / "nowhere",), rgb, "new"))
    decode = ["decode", "x.npy", "--vae", vae[0]]
    assert "there is no file x.npy" in refused(*cli(*decode))
    np.save("x.npy", np.zeros((2, 3, 4, 4), np.float32))
    assert "(n, 4, height, width), got (2, 3, 4, 4)" in refused(*cli(*decode))
    assert "--out must be" in refused(*cli(*decode, "--out", "x.jpg"))
    Path("x.npy").write_bytes(b"text")
    refused(*cli(*decode))


def test_without_diffusers_it_says_what_to_install(cli, rgb, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    code, _, err = encode(cli, ("vae",), rgb)
    assert code == 2
    assert "pip install 'lit-diffusion[diffusers]'" in err
    assert not list(Path().iterdir())
