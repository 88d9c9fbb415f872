"""Captions: from a column of strings through training to prompts, samples and the report."""

import csv
import html
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from image_files import encode, module, pixels, same, take, write_parquet
from test_own_data import trainer

import lit_diffusion as ld
from lit_diffusion import load_pretrained
from lit_diffusion.nn import ByteTransformer, UNet, bytes_text, text_bytes
from lit_diffusion.training import DataModule, LitDiffusion, SampleGrid, export, sample
from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.data.reading.columns import MisfitError, caption
from lit_diffusion.training.reporting.write import write_report
from lit_diffusion.training.restore.initial_weights import start_from
from lit_diffusion.training.run.grid_texts import texts_of
from lit_diffusion.training.step import randomness

pytestmark = pytest.mark.filterwarnings("ignore:skipped")

SHAPE = (3, 5, 7)
N = 26
CAPTIONS = [f"number {i}{' é' * (i % 3)}" for i in range(N)]
LENGTH = 16


def write(folder, captions=CAPTIONS, **columns):
    """26 images with a caption and an age each; ten of them to validate on."""
    images = [encode(image) for image in pixels(N, SHAPE)]
    columns = {"said": captions, "age": list(range(N))} | columns
    for name, end in (("train-00000-of-00001", N), ("test-00000-of-00001", 10)):
        these = {key: values[:end] for key, values in columns.items()}
        write_parquet(
            folder / f"{name}.parquet", images[:end], [i % 4 for i in range(end)], **these
        )
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("captions"))


SETTINGS = {"shape": SHAPE, "text_key": "said", "text_length": LENGTH, "batch_size": 4}


def captioned(folder, place=(0, 1), stage="fit", **arguments):
    return module(folder, place, stage, **(SETTINGS | arguments))


def assert_true(batches):
    """Every row has the caption of the example whose number it says."""
    for batch in batches:
        assert batch["text"].dtype == torch.int64
        assert batch["text"].shape == (len(batch["index"]), LENGTH)
        assert bytes_text(batch["text"]) == [CAPTIONS[i] for i in batch["index"]]


# The data -------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(("world", "workers"), [(1, 0), (2, 1)])
def test_captions_stand_beside_their_example(folder, streaming, world, workers):
    for rank in range(world):
        data = captioned(folder, (rank, world), streaming=streaming, num_workers=workers)
        assert_true(take(data.train_dataloader(), 9))
        assert_true(data.val_dataloader())
    assert_true(data.examples("test", 3))
    both = captioned(folder, streaming=streaming, condition_keys=("age",))
    batches = take(both.train_dataloader(), 3)
    assert list(batches[0]) == ["image", "label", "age", "text", "index"]
    assert all(torch.equal(batch["age"], batch["index"]) for batch in batches)
    assert_true(batches)


@pytest.mark.parametrize("streaming", [True, False])
def test_resuming_is_exact(folder, streaming):
    settings = {"streaming": streaming, "shuffle_window": 8}
    loader = captioned(folder, **settings).train_dataloader()
    take(loader, 5)
    state = loader.state_dict()
    expected = take(loader, 10)
    resumed = captioned(folder, **settings).train_dataloader()
    resumed.load_state_dict(state)
    assert same(take(resumed, 10), expected)
    for changed, named in (({"text_length": 20}, "text_length"), ({"text_key": None}, "text_key")):
        other = captioned(folder, **settings, **changed).train_dataloader()
        with pytest.raises(ValueError, match=rf"cannot resume the data: data\.{named} was"):
            other.load_state_dict(state)


@pytest.mark.parametrize("streaming", [True, False])
def test_the_order_is_that_without_captions(folder, streaming):
    loaders = [
        captioned(folder, streaming=streaming, text_key=key).train_dataloader()
        for key in (None, "said")
    ]
    plain, told = (take(loader, 15) for loader in loaders)
    assert same(plain, [{key: batch[key] for key in plain[0]} for batch in told])


def test_the_map_holds_bytes_and_one_without_captions_stays_valid(folder):
    found = captioned(folder, streaming=False, condition_keys=("age",))._memory
    stored = np.load(found.folder / "condition-1.npy")
    assert (stored.dtype, stored.shape) == (np.uint8, (N, LENGTH))
    assert bytes_text(torch.from_numpy(stored)) == CAPTIONS
    longer = captioned(folder, streaming=False, text_length=20)._memory
    assert longer.folder != found.folder
    plain = captioned(folder, streaming=False, text_key=None)._memory
    identity = json.loads((plain.folder / "identity.json").read_text())
    assert set(identity) == {"format", "shape", "image_key", "label_key", "fingerprint"}


def worse(i):
    return {2: None, 5: "", 7: " \t", 8: "x" * 17, 9: "a\0b"}.get(i, CAPTIONS[i])


BAD = {
    "2": "a caption in column 'said', got none; remove the row",
    "5": "got '', which is blank",
    "7": "which is blank",
    "8": "a text of at most 16 bytes, got 17",
    "9": "zero characters",
}


@pytest.mark.parametrize("streaming", [True, False])
def test_bad_ones_are_left_out_and_named(tmp_path, streaming):
    """A caption that is too long is not cut off: that would be silent."""
    write(tmp_path / "x", [worse(i) for i in range(N)])
    data = DataModule(
        str(tmp_path / "x"), **SETTINGS, max_bad_share=0.5, streaming=streaming, shuffle_window=8
    )
    text = ByteTransformer(LENGTH, width=8, depth=1, heads=1)
    network = UNet(SHAPE, channels=(8,), attention=(5,), text=text)
    trainer(tmp_path, max_steps=12, limit_val_batches=0).fit(LitDiffusion(network), data)
    rows = csv.DictReader((tmp_path / "bad_examples.csv").read_text().splitlines())
    reasons = {row["row"]: row["reason"] for row in rows if row["split"] == "train"}
    assert set(reasons) == set(BAD)
    assert all(BAD[row] in reasons[row] for row in BAD)
    assert "set data.text_length" in reasons["8"]
    data.teardown("fit")


@pytest.mark.parametrize("stored", [3, 0.5, ["a", "b"], {"en": "a"}, b"a"])
def test_what_is_no_caption(stored):
    with pytest.raises(MisfitError, match=r"column 'said', got .*set data.text_key"):
        caption(stored, "said", 9)


def test_arguments_and_columns_are_checked(folder):
    with pytest.raises(ValueError, match=r"column 'what' in split.*set data.text_key; null"):
        captioned(folder, text_key="what")
    with pytest.raises(ValueError, match="text_length must be at least 1"):
        captioned(folder, text_length=0)
    with pytest.raises(ValueError, match="makes the entry 'text' of a batch"):
        captioned(folder, condition_keys=("text",))
    with pytest.raises(ValueError, match="a caption in column 'age', got int '0'"):
        captioned(folder, text_key="age", on_bad_example="raise")


# Models ---------------------------------------------------------------------------------------


def reading(seed=0, **arguments):
    """A model that reads texts, and answers differently to each."""
    torch.manual_seed(seed)
    text = ByteTransformer(LENGTH, width=8, depth=1, heads=1)
    network = UNet((1, 8, 8), channels=(8,), attention=(8,), text=text, **arguments)
    model = LitDiffusion(network, sampler=ld.DDIMSampler(steps=2))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    return model


def saved(model, path="x.ckpt"):
    run = trainer(Path.cwd())
    run.strategy.connect(model)
    run.save_checkpoint(path)
    return model.eval()


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return saved(reading())


def of(model, prompts, **arguments):
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    return model.sample(len(prompts), generators, cond={"text": prompts}, **arguments)


def test_the_model_knows_its_condition_from_the_network(model):
    assert model.conditions == ("text",)
    one, other = of(model, ["a"] * 3), of(model, ["a", "b", "a"])
    assert [torch.allclose(*pair, atol=1e-6) for pair in zip(one, other, strict=True)] == [
        True, False, True,
    ]  # fmt: skip
    assert torch.equal(one, of(model, text_bytes(["a"] * 3)))
    assert not torch.allclose(one, of(model, ["a"] * 3, guidance=3.0))
    with pytest.raises(ValueError, match="Expected 3 rows of 'text'"):
        model.sample(3, cond={"text": ["a"]})
    assert not hasattr(LitDiffusion(UNet(channels=(8,), attention=())), "text")


def test_a_checkpoint_and_an_export_keep_the_encoder(model):
    again = LitDiffusion.load_from_checkpoint("x.ckpt")
    assert torch.equal(of(again, ["a", "b"]), of(model, ["a", "b"]))
    export("x.ckpt", out="exported")
    exported = load_pretrained("exported")
    assert exported.conditions == ("text",)
    torch.testing.assert_close(of(exported, ["a", "b"]), of(model, ["a", "b"]))
    card = Path("exported/README.md").read_text()
    assert 'cond={"text": ["a prompt"] * 4})' in card
    assert "a text a list of 4 strings" in card


def test_sample_from_prompts(model):
    def found(prompt, n=4, **arguments):
        return sample(
            "x.ckpt", num_samples=n, prompt=prompt, device="cpu", batch_size=3, **arguments
        )

    one, other = found("a").images, found("b").images
    assert not torch.allclose(one, other)
    both = found(["a", "b"]).images
    torch.testing.assert_close(both[::2], one[::2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(both[1::2], other[1::2], rtol=1e-4, atol=1e-5)
    assert texts_of(Path("samples.png")) == [["a", "b"], ["a", "b"]]
    assert not torch.allclose(found("a", guidance=3.0).images, one)
    found("a", out="folder")
    assert json.loads(Path("folder/samples.json").read_text())["prompt"] == ["a"]
    found("a", n=6, out="folder")
    with pytest.raises(ValueError, match="got another prompt"):
        found("b", out="folder")


@pytest.mark.parametrize(
    ("words", "telling"),
    [
        (["--prompt="], "Expected as a prompt a text, got '', which is blank"),
        (["--prompt=[]"], "--prompt must be a text or a list of texts"),
        (["--prompt", "x" * 17], "Expected as a prompt a text of at most 16 bytes, got 17"),
        (["--prompt=a", "--split=test"], "no conditions besides the class and the prompt"),
        (["--prompt=a", "--label=3"], "trained without classes"),
    ],
)
def test_a_mistake_is_one_line(cli, model, words, telling):
    code, _, err = cli("sample", "--ckpt_path=x.ckpt", "--device=cpu", *words)
    assert code == 2
    assert len([line for line in err.splitlines() if not line.startswith("Using ")]) == 1
    assert telling in err
    assert not Path("samples.png").exists()


def test_prompts_are_for_models_that_read(cli, model):
    saved(LitDiffusion(UNet(channels=(8,), attention=())), "y.ckpt")
    code, _, err = cli("sample", "--ckpt_path=y.ckpt", "--prompt=a")
    assert code == 2
    assert "Prompts are for a model with the condition 'text'" in err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a three", ["a three"]),
        ("7", ["7"]),
        ("yes", ["yes"]),
        ("one, two: #3", ["one, two: #3"]),
        ("[a three, '7']", ["a three", "7"]),
    ],
)
def test_prompts_on_the_command_line(cli, model, given, expected):
    code, _, err = cli(
        "sample", "--ckpt_path=x.ckpt", "--num_samples=2", "--device=cpu", "--prompt", given
    )
    assert code == 0, err
    shown = [text for row in texts_of(Path("samples.png")) for text in row]
    assert shown == [expected[i % len(expected)] for i in range(2)]


def test_a_grid_keeps_its_texts(tmp_path):
    path, texts = tmp_path / "x.png", ["a <b>", "é\n", "三", "d", "e"]
    images = torch.rand(5, 1, 8, 8)
    picture = save_grid(images, path, 3, texts=texts)
    assert texts_of(path) == [texts[:3], texts[3:]]
    assert torch.equal(save_grid(images, path, 3), picture)
    assert texts_of(path) == []


@pytest.mark.parametrize("prompts", [(), ("a", "b")])
def test_grids_in_training_have_prompts_or_captions(tmp_path, folder, prompts):
    text = ByteTransformer(LENGTH, width=8, depth=1, heads=1)
    model = LitDiffusion(
        UNet(SHAPE, channels=(8,), attention=(5,), text=text), sampler=ld.DDIMSampler(steps=2)
    )
    grid = SampleGrid(rows=2, columns=3, prompts=prompts, guidance=2.0)
    data = DataModule(str(folder), **SETTINGS)
    trainer(tmp_path, max_steps=2, callbacks=[grid]).fit(model, data)
    (path,) = (tmp_path / "samples").glob("step-*.png")
    expected = [] if prompts else [CAPTIONS[:3], CAPTIONS[3:6]]
    assert texts_of(path) == expected
    page = html.unescape(write_report(tmp_path).read_text())
    assert ("<li>a</li><li>b</li><li>a</li>" in page) == bool(prompts)
    assert ("Captions, by row and column" in page) != bool(prompts)
    missing = [text for row in expected for text in row if text not in page]
    assert missing == []


def test_a_grid_refuses_prompts_that_cannot_be(tmp_path, folder):
    for network, prompts, telling in (
        (UNet(SHAPE, channels=(8,), attention=()), ("a",), "Prompts are for a model"),
        (reading().denoiser.network, ("x" * 17,), "at most 16 bytes, got 17"),
    ):
        grid = SampleGrid(rows=2, columns=3, prompts=prompts)
        with pytest.raises(ValueError, match=telling):
            grid.on_fit_start(None, LitDiffusion(network))


def test_a_text_beside_other_conditions(tmp_path, monkeypatch, folder):
    """Prompts replace the captions; the other conditions are those of examples."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = ByteTransformer(LENGTH, width=8, depth=1, heads=1)
    network = UNet(SHAPE, channels=(8,), attention=(5,), text=text, conditions={"age": 1})
    model = LitDiffusion(network, sampler=ld.DDIMSampler(steps=2))
    for p in model.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    grid = SampleGrid(rows=1, columns=3, prompts=("a",))
    data = DataModule(str(folder), **SETTINGS, condition_keys=("age",))
    run = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, callbacks=[grid], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    run.fit(model, data)
    saved(model)
    config = {"data": {"path": str(folder), **SETTINGS, "condition_keys": ["age"]}}
    config["data"]["shape"] = list(SHAPE)
    Path("c.yaml").write_text(json.dumps(config))
    words = {"device": "cpu", "num_samples": 3, "config": "c.yaml"}
    one, other = (sample("x.ckpt", prompt=prompt, **words).images for prompt in ("a", "b"))
    assert not torch.allclose(one, other)
    cond = {"text": ["a"] * 3, "age": torch.arange(3)}
    noise = randomness.generators(0, "sample", [0, 1, 2])
    torch.testing.assert_close(one, model.sample(3, noise, cond=cond), rtol=1e-4, atol=1e-5)


def test_a_model_without_texts_can_be_the_start(tmp_path, monkeypatch):
    """The attention to the text adds nothing at first."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    plain = LitDiffusion(UNet((1, 8, 8), channels=(8,), attention=(8,)))
    for p in plain.parameters():
        p.data += 0.2 * torch.randn(p.shape)
    saved(plain)
    text = ByteTransformer(LENGTH, width=8, depth=1, heads=1)
    reads = LitDiffusion(UNet((1, 8, 8), channels=(8,), attention=(8,), text=text))
    start_from(reads, "x.ckpt")
    noise = torch.Generator().manual_seed(0)
    images = reads.sample(2, noise, cond={"text": ["a", "b"]})
    torch.testing.assert_close(images, plain.sample(2, torch.Generator().manual_seed(0)))
