"""Tokens of a frozen text encoder: on the fly, stored by `encode --text`, and in a checkpoint."""

import sys
from pathlib import Path

import pytest
import torch
import yaml
from image_files import encode as png
from image_files import pixels, write_parquet

from lit_diffusion.nn import bytes_text
from lit_diffusion.training import DataModule, LitDiffusion

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny_text import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore:skipped")

SHAPE, N = (1, 8, 8), 12
CAPTIONS = ["a three", "seven", "the digit eight", "a number"] * 3


def write(folder, captions=CAPTIONS, column="said"):
    for split in ("train", "test"):
        images = [png(image) for image in pixels(N, SHAPE)]
        write_parquet(
            folder / f"{split}-00000-of-00001.parquet",
            images,
            [i % 4 for i in range(N)],
            **{column: captions},
        )
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "data")
    save_tiny(tmp_path / "encoder")
    return tmp_path


def encoded(cli, *further, out="encoded", text="encoder", source="data", key="said"):
    return cli(
        "encode", "--text", text, f"--data.path={source}", "--data.shape=[1,8,8]",
        f"--data.text_key={key}", "--data.label_key=null", "--device=cpu", "--out", out,
        "--batch_size=5", *further,
    )  # fmt: skip


def fitted(cli, *data, name="run", text="encoder"):
    code, out, err = cli(
        "fit", f"--name={name}", "--seed_everything=0", "--data.shape=[1,8,8]",
        "--data.label_key=null", "--data.batch_size=4", "--data.steps_per_epoch=3", *data,
        "--model.network=UNet", "--model.network.channels=[8]", "--model.network.attention=[8]",
        "--model.network.text=TransformersText", f"--model.network.text.path={text}",
        "--model.label_dropout=0.5", "--model.sampler=DDIMSampler",
        "--model.sampler.steps=2", "--trainer.max_steps=3", "--trainer.log_every_n_steps=1",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        "--trainer.num_sanity_val_steps=0",
    )  # fmt: skip
    assert code == 0, err
    return Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))


def weights(run):
    path = next((run / "checkpoints").glob("*.ckpt"))
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_stored_tokens_train_as_those_made_on_the_fly(cli, here, streaming):
    code, _out, err = encoded(cli)
    assert code == 0, err
    card = Path("encoded/README.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    facts = yaml.safe_load(card)["text_encoder"]
    assert (facts["path"], facts["tokens"], facts["width"]) == ("encoder", 5, 16)

    options = (f"--data.streaming={streaming}", "--data.cache_dir=cache")
    live = fitted(cli, "--data.path=data", "--data.text_key=said", *options, name="live")
    kept = fitted(
        cli, "--data.path=encoded", "--data.condition_keys=[text]", *options, name="kept"
    )
    one, other = weights(live), weights(kept)
    names = one["state_dict"].keys()
    assert names == other["state_dict"].keys()
    assert [name for name in names if ".text." in name] == ["denoiser.network.text.identity"]
    for name in names:
        torch.testing.assert_close(
            one["state_dict"][name], other["state_dict"][name], rtol=1e-2, atol=1e-4
        )
    # The run with stored tokens is sampled with a prompt, by loading the encoder.
    code, _out, err = cli(
        "sample", "--ckpt_path", str(kept), "--prompt", "a three", "--num_samples=2",
        "--guidance=2", "--device=cpu", "--out=samples.npy",
    )  # fmt: skip
    assert code == 0, err
    assert Path("samples.npy").is_file()
    # Without one, the tokens of validation examples are its conditions.
    code, _out, err = cli(
        "sample", "--ckpt_path", str(kept), "--num_samples=2", "--device=cpu", "--out=more.npy"
    )
    assert code == 0, err


def test_what_is_stored(cli, here):
    write(here / "other", column="text")
    code, _out, err = encoded(cli, source="other", key="text")
    assert code == 0, err
    settings = {"shape": SHAPE, "label_key": None}
    before = DataModule("data", text_key="said", **settings)
    after = DataModule("encoded", condition_keys=["text"], text_key=None, **settings)
    captions = DataModule("encoded", text_key="caption", **settings)
    (old,), (new,), (told,) = (list(d.examples("train", 50)) for d in (before, after, captions))
    assert torch.equal(old["image"], new["image"])
    assert bytes_text(told["text"]) == CAPTIONS
    from lit_diffusion import TransformersText

    encoder = TransformersText("encoder")
    (tokens, mask), (expected, used) = encoder(new["text"]), encoder(old["text"])
    assert torch.equal(mask, used)
    torch.testing.assert_close(tokens, expected, rtol=2e-3, atol=2e-3)


def test_bad_captions_are_left_out_and_named(cli, here):
    write(here / "gaps", [None, " ", *CAPTIONS[2:]])
    code, _out, err = encoded(cli, "--data.max_bad_share=0.5", source="gaps")
    assert code == 0, err
    assert "got none" in err
    data = DataModule("encoded", condition_keys=["text"], shape=SHAPE, label_key=None)
    (batch,) = data.examples("train", 50)
    assert len(batch["text"]) == N - 2


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--data.text_key=null"], "name their column as --data.text_key"),
        (["--mirrored=true"], "--mirrored is for --vae"),
        (["--text=nowhere/at/all"], "no folder here and cannot be downloaded"),
        (["--data.condition_keys=[text]", "--data.text_key=said"], "makes the entry 'text'"),
    ],
)
def test_mistakes_leave_nothing(cli, here, words, telling, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _out, err = encoded(cli, *words)
    assert code == 2
    assert telling in err
    assert not Path("encoded").exists()


def test_a_caption_of_too_many_tokens(cli, here):
    write(here / "long", ["a " * 20, *CAPTIONS[1:]])
    code, _out, err = encoded(cli, source="long")
    assert code == 2
    assert "expected in column 'said' a text of at most 12 tokens of encoder, got 22" in err
    assert not Path("encoded").exists()
    code, _out, err = encoded(cli, "--truncate=true", source="long")
    assert code == 0, err


def test_another_encoder_is_refused(cli, here):
    run = fitted(cli, "--data.path=data", "--data.text_key=said")
    assert (
        weights(run)["hyper_parameters"]["network"]["init_args"]["text"]["init_args"]["path"]
        == "encoder"
    )
    model = LitDiffusion.load_from_checkpoint(next((run / "checkpoints").glob("*.ckpt")))
    assert not list(model.denoiser.network.text.parameters())
    save_tiny(here / "encoder", seed=1)
    code, _out, err = cli("sample", "--ckpt_path", str(run), "--prompt", "a", "--device=cpu")
    assert code == 2
    assert "the text encoder that these weights were trained with" in err


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (["--data.text_length=20"], (20, 20)),
        (["--model.network.text.length=24"], (24, 24)),
        ([], (256, 256)),
        (["--data.text_length=20", "--model.network.text.length=24"], (20, 24)),
        (["--data.text_length=25", "--model.network.text.length=24"], None),
    ],
)
def test_the_length_is_said_once(cli, here, given, found):
    code, out, err = cli(
        "fit", "--data.path=data", "--data.shape=[1,8,8]", "--data.text_key=said",
        "--data.label_key=null", "--data.batch_size=4", "--data.steps_per_epoch=1",
        "--model.network=UNet", "--model.network.channels=[8]", "--model.network.attention=[8]",
        "--model.network.text=ByteTransformer", "--model.network.text.width=8",
        "--model.network.text.depth=1", "--trainer.max_steps=1", "--trainer.accelerator=cpu",
        "--trainer.enable_progress_bar=false", "--trainer.num_sanity_val_steps=0",
        "--trainer.log_every_n_steps=1", *given,
    )  # fmt: skip
    if found is None:
        assert code == 2
        assert (
            "data.text_length is 25, and the network's ByteTransformer takes captions of at" in err
        )
        assert not Path("runs").exists()
        return
    assert code == 0, err
    run = Path(out.strip().splitlines()[-1].removeprefix("Run folder: "))
    config = yaml.safe_load((run / "config.yaml").read_text())
    length = config["model"]["network"]["init_args"]["text"]["init_args"]["length"]
    said = config["data"]["text_length"]
    assert (said or 256, length or 256) == found
    kept = weights(run)["state_dict"]["denoiser.network.text.place"]
    assert len(kept) == found[1]
