"""Loaders of one's own: their batches, their range of values, their shapes and labels."""

import sys

import lightning as L
import pytest
import torch
import warm
import yaml
from test_conditioning import Spy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lit_diffusion as ld
from lit_diffusion import description
from lit_diffusion.nn import ByteTransformer, UNet
from lit_diffusion.nn.text import bytes_text
from lit_diffusion.training import Likelihood, LitDiffusion, NoiseLevelLoss, SampleGrid
from lit_diffusion.training.step.batches import Numbered, standard

pytestmark = pytest.mark.filterwarnings("ignore:.*no `val_dataloader`")

BYTES = torch.randint(0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
X, Y = BYTES / 127.5 - 1, torch.arange(12) % 10


class Rows(torch.utils.data.Dataset):
    """Examples as dictionaries."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["image"])

    def __getitem__(self, i):
        return {name: column[i] for name, column in self.columns.items()}


def loader(data, batch_size=4):
    return DataLoader(data, batch_size)


def model(num_classes=10, shape=(1, 8, 8), **arguments):
    torch.manual_seed(0)
    network = UNet(shape=shape, channels=(8,), attention=(), num_classes=num_classes)
    return LitDiffusion(network, sampler=ld.DDIMSampler(steps=2), **arguments)


def trainer(folder, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False, "max_epochs": 1}
    return L.Trainer(default_root_dir=folder, **(quiet | arguments))


class Keep(L.Callback):
    """Keeps the losses of each validation batch."""

    def __init__(self):
        self.losses = []

    def on_validation_batch_end(self, trainer, pl_module, outputs, *args):
        self.losses.append(outputs["losses"])


FORMS = {
    "dict": Rows(image=X, label=Y),
    "dict of bytes": Rows(image=BYTES, label=Y),
    "pair": TensorDataset(X, Y),
    "pair of bytes": TensorDataset(BYTES, Y),
}


def validated(folder, subject, data, batch_size=4):
    keep = Keep()
    run = trainer(folder, callbacks=[keep, Likelihood()])
    (found,) = run.validate(subject, loader(data, batch_size), verbose=False)
    return found, torch.cat(keep.losses)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_batch_gives_the_same_numbers(tmp_path, form):
    """In training, in validation and in the bound."""
    results = []
    for data in (FORMS["dict"], FORMS[form]):
        subject = model()
        callbacks = [NoiseLevelLoss(probe_every_n_steps=1), SampleGrid(1, 2), Likelihood()]
        run = trainer(tmp_path, callbacks=callbacks, num_sanity_val_steps=0)
        run.fit(subject, loader(data), loader(data))
        metrics = {k: v.item() for k, v in run.callback_metrics.items()}
        assert metrics.keys() >= {"val/loss", "val/bpd"}
        predicted = torch.cat(trainer(tmp_path).predict(subject, loader(data)))
        results.append((metrics, predicted))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("data", [TensorDataset(X), X], ids=["(x,)", "x"])
def test_images_alone_train_a_model_without_classes(tmp_path, data):
    subject = model(num_classes=None)
    trainer(tmp_path).fit(subject, loader(data), loader(data))
    assert len(torch.cat(trainer(tmp_path).predict(subject, loader(data)))) == len(X)


def test_the_noise_of_an_example_without_a_number_is_that_of_its_place(tmp_path):
    """For any batch size, and at each validation anew; with index and total it is stratified."""
    subject = model().eval()
    found, losses = validated(tmp_path, subject, FORMS["pair"], 4)
    again, same = validated(tmp_path, subject, FORMS["pair"], 5)
    assert found == pytest.approx(again, rel=1e-5)
    torch.testing.assert_close(losses, same)
    numbered = Rows(image=X, label=Y, index=torch.arange(12))
    torch.testing.assert_close(validated(tmp_path, subject, numbered)[1], losses)
    stratified = Rows(image=X, label=Y, index=torch.arange(12), total=torch.full((12,), 12))
    assert not torch.allclose(validated(tmp_path, subject, stratified)[1], losses)


def test_a_batch_that_a_loader_gives_twice_has_other_numbers_each_time(tmp_path):
    keep = Keep()
    batches = iter([X[:4]] * 2)
    trainer(tmp_path, callbacks=[keep]).validate(model(None).eval(), batches, verbose=False)
    assert not torch.equal(*keep.losses)


def test_ranks_share_no_number(monkeypatch):
    found = []
    for rank in range(3):
        monkeypatch.setattr(
            "lit_diffusion.training.step.batches.place", lambda rank=rank: (rank, 3)
        )
        numbered = Numbered()
        found += [numbered.next(x, {"image": x})["index"] for x in X.split(5)]
    assert torch.cat(found).sort().values.tolist() == list(range(36))


def test_a_double_model_gets_double_images():
    assert standard(X, torch.float64)["image"].dtype == torch.float64
    assert standard(BYTES, torch.float64)["image"].dtype == torch.float64


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((X, Y, Y), "a tuple of 3"),
        ({"pixels": X}, "a dict with 'pixels'"),
        ("x", "a str"),
        (BYTES.long(), "torch.int64"),
    ],
    ids=["three", "other key", "text", "integers"],
)
def test_another_batch_is_refused_in_one_line(batch, message):
    with pytest.raises(ValueError, match=message) as caught:
        standard(batch)
    assert "\n" not in str(caught.value)


# The range of values --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "remedy"),
    [(BYTES.float(), r"from 0 to 25\d .*x / 127.5 − 1"), (3 * X, "scale them; .*clip_denoised")],
    ids=["bytes as floats", "standardised"],
)
def test_images_beyond_the_range_are_refused_before_the_first_step(tmp_path, x, remedy):
    subject = model(None)
    before = [p.clone() for p in subject.parameters()]
    with pytest.raises(ValueError, match=remedy):
        trainer(tmp_path).fit(subject, loader(x))
    assert all(map(torch.equal, before, subject.parameters()))
    trainer(tmp_path).fit(model(None, clip_denoised=False), loader(x))


def test_images_from_0_to_1_are_reported_once(tmp_path):
    with pytest.warns(UserWarning, match="2 x − 1") as caught:
        trainer(tmp_path, max_epochs=2).fit(model(None), loader(BYTES / 255))
    assert sum("2 x − 1" in str(one.message) for one in caught) == 1


# Shapes ---------------------------------------------------------------------------------------


def test_the_shape_is_that_of_the_network():
    subject = model(shape=(3, 16, 8))
    assert subject.shape == (3, 16, 8)
    assert subject.sample(2).shape == (2, 3, 16, 8)
    assert subject.hparams["shape"] == [3, 16, 8]
    assert ld.Pretrained(UNet((3, 16, 8), channels=(8,), attention=())).shape == (3, 16, 8)


@pytest.mark.parametrize("kind", [LitDiffusion, ld.Pretrained])
def test_an_argument_that_contradicts_the_network_is_refused(kind):
    with pytest.raises(ValueError, match=r"shape=\(1, 8, 8\), for which the UNet is built"):
        kind(UNet(shape=(1, 8, 8)), shape=(1, 28, 28))


def test_images_of_another_shape_are_refused_before_the_first_step(tmp_path):
    subject = model(None)
    before = [p.clone() for p in subject.parameters()]
    for stage in ("fit", "validate", "predict"):
        with pytest.raises(ValueError, match=r"got \(1, 28, 28\) in a batch"):
            getattr(trainer(tmp_path), stage)(subject, loader(torch.zeros(4, 1, 28, 28)))
    assert all(map(torch.equal, before, subject.parameters()))


class Plain(nn.Module):
    """A network that does not know its shape."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z, logsnr, label=None):
        return self.scale * z


def test_a_network_that_does_not_say_gets_the_shape_of_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr(description, "_ALLOWED", [*description._ALLOWED, __name__])
    subject = LitDiffusion(Plain(), sampler=ld.DDIMSampler(steps=2))
    with pytest.raises(ValueError, match="give the model shape"):
        subject.sample(1)
    run = trainer(tmp_path)
    run.fit(subject, loader(torch.zeros(4, 3, 6, 5)))
    assert subject.sample(2).shape == (2, 3, 6, 5)
    run.save_checkpoint(tmp_path / "plain.ckpt")
    loaded = LitDiffusion.load_from_checkpoint(tmp_path / "plain.ckpt")
    assert loaded.shape == (3, 6, 5)


# Labels and guidance --------------------------------------------------------------------------


def test_classes_without_labels_are_refused_before_the_first_step(tmp_path):
    with pytest.raises(ValueError, match="Expected labels, for the network has num_classes=10"):
        trainer(tmp_path).fit(model(), loader(X))


def test_labels_that_are_not_integers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Expected integer labels, got"):
        trainer(tmp_path).fit(model(), loader(TensorDataset(X, Y.float())))


class Guess(LitDiffusion):
    """A model that finds the labels by itself."""

    def condition(self, batch):
        return super().condition(
            {**batch, "label": torch.zeros(len(batch["image"]), dtype=torch.long)}
        )


def test_labels_may_come_from_the_model(tmp_path):
    network = UNet(channels=(8,), attention=(), num_classes=10)
    trainer(tmp_path).fit(Guess(network), loader(X))


@pytest.mark.parametrize("num_classes", [10, None])
def test_guidance_without_its_training_is_refused_before_the_first_step(tmp_path, num_classes):
    subject = model(num_classes, label_dropout=0.0)
    data = loader(TensorDataset(X, Y))
    with pytest.raises(ValueError, match="Guidance needs"):
        trainer(tmp_path, callbacks=[SampleGrid(1, 2, guidance=2.0)]).fit(subject, data, data)
    with pytest.raises(ValueError, match="Guidance needs"):
        subject.sample(1, guidance=2.0)
    assert subject.sample(1).shape == (1, 1, 8, 8)


def test_other_conditions_are_guided_like_classes():
    subject = LitDiffusion(Spy(), conditions=("age",), label_dropout=0.0)
    with pytest.raises(ValueError, match="label_dropout=0"):
        subject.sample(1, guidance=2.0, cond={"age": torch.zeros(1, 1)})


# Several ranks ---------------------------------------------------------------------------------

TWO_RANKS = """
import sys
import torch
from torch.utils.data import DataLoader
from lit_diffusion.training import DataModule
from lit_diffusion.training.cli import main

class OwnLoader(DataModule):
    def train_dataloader(self):
        rows = [{"image": torch.zeros(1, 8, 8), "label": torch.tensor(0), "index": torch.tensor(i)}
                for i in range(16)]
        return DataLoader(rows, 4, shuffle=True)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.trainer.training:
            with open(f"seen{self.trainer.global_rank}.txt", "a") as file:
                file.write(" ".join(map(str, batch["index"].tolist())) + "\\n")
        return super().on_after_batch_transfer(batch, dataloader_idx)

if __name__ == "__main__":
    main(data_class=OwnLoader)
"""


def test_a_loader_is_divided_among_the_ranks_by_default(cli):
    code, out, _ = cli("fit", "--print_config")
    assert code == 0
    assert yaml.safe_load(out)["trainer"]["use_distributed_sampler"] is True


@pytest.mark.slow
def test_two_ranks_share_the_examples_of_a_loader(tmp_path):
    (tmp_path / "own.py").write_text(TWO_RANKS)
    words = [
        sys.executable, "own.py", "fit", "--trainer.devices=2", "--trainer.strategy=ddp",
        "--trainer.accelerator=cpu", "--trainer.max_epochs=2", "--trainer.limit_val_batches=0",
        "--model.network=UNet", "--model.network.channels=[8]", "--model.network.attention=[]",
        "--model.network.num_classes=10", "--trainer.enable_progress_bar=false",
    ]  # fmt: skip
    done = warm.run(words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [(tmp_path / f"seen{rank}.txt").read_text().split() for rank in (0, 1)]
    for epoch in (slice(0, 8), slice(8, 16)):
        assert sorted(map(int, seen[0][epoch] + seen[1][epoch])) == list(range(16))
    assert seen[0][:8] != seen[0][8:]  # another order in each epoch


# Names of one's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["names", "positions"])
def test_entries_of_other_names_are_those_that_keys_name(tmp_path, form):
    if form == "names":
        data = [{"pixels": x, "class": y, "name": "?"} for x, y in zip(X, Y, strict=True)]
        keys = {"image": "pixels", "label": "class"}
    else:
        data, keys = TensorDataset(Y, torch.zeros(12), X), {"image": 2, "label": 0}
    found, losses = validated(tmp_path, model(keys=keys), data)
    expected, same = validated(tmp_path, model(), FORMS["pair"])
    assert found == expected
    assert torch.equal(losses, same)
    subject = model(keys=keys)
    run = trainer(tmp_path)
    run.fit(subject, loader(data))
    run.save_checkpoint(tmp_path / "keys.ckpt")
    assert LitDiffusion.load_from_checkpoint(tmp_path / "keys.ckpt").keys == keys


@pytest.mark.parametrize(
    ("keys", "batch", "message"),
    [
        ({"image": "pixels"}, {"x": X, "y": Y}, "'pixels' for 'image'.* a dict with 'x', 'y'"),
        ({"image": 3}, (X, Y), "3 for 'image'.* a tuple of 2"),
        ({"image": "pixels"}, (X, Y), "'pixels' for 'image'.* a tuple of 2"),
        ({"image": "pixels"}, X, "got a Tensor: leave keys out"),
        ({"label": 1}, (X, Y), "Expected a batch that is"),
    ],
)
def test_an_entry_that_is_not_there_is_named_with_those_that_are(keys, batch, message):
    with pytest.raises(ValueError, match=message) as caught:
        model(keys=keys).standard(batch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keys", [{}, {"image": 0, "label": "y"}, {"image": None}, {0: "x"}])
def test_keys_that_are_none_are_refused(keys):
    with pytest.raises(ValueError, match="Expected keys that are names"):
        model(keys=keys)


def test_texts_may_be_strings():
    network = UNet(
        (1, 8, 8), channels=(8,), attention=(8,), text=ByteTransformer(length=8, width=8, depth=1)
    )
    subject = LitDiffusion(network, keys={"text": "caption"})
    batch = subject.standard({"image": X[:2], "caption": ["a 3", "é"]})
    assert batch["text"].shape == (2, 8)
    assert bytes_text(batch["text"]) == ["a 3", "é"]
