"""One seed for a run: weights, noise and order follow it unless they have their own."""

import csv

import pytest
import torch
import yaml

from lit_diffusion.training import DataModule, LitDiffusion

QUICK = (
    "--trainer.max_steps=2", "--data.steps_per_epoch=2", "--data.batch_size=8",
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    "--trainer.limit_val_batches=0", "--trainer.log_every_n_steps=1", "--model.network=UNet",
    "--model.network.channels=[8]", "--model.network.attention=[]",
    "--model.network.num_classes=10",
)  # fmt: skip


@pytest.fixture
def seeded(cli, tmp_path):
    """Run a short fit; returns its folder."""

    def run(*words):
        code, out, err = cli("fit", *QUICK, *words)
        assert code == 0, err
        return tmp_path / out.splitlines()[-1].removeprefix("Run folder: ")

    return run


def seeds(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    return config["seed_everything"], config["model"]["seed"], config["data"]["seed"]


def losses(folder):
    rows = csv.DictReader((folder / "metrics.csv").read_text().splitlines())
    return [row["train/loss"] for row in rows]


def test_noise_and_order_follow_the_seed_of_the_run(seeded):
    one = seeded("--seed_everything=1")
    assert seeds(one) == (1, 1, 1)
    checkpoint = next((one / "checkpoints").glob("*.ckpt"))
    assert LitDiffusion.load_from_checkpoint(checkpoint).seed == 1
    # The saved config repeats the run, also under another seed of the first weights.
    again = seeded("--config", one / "config.yaml")
    assert seeds(again) == (1, 1, 1)
    assert losses(again) == losses(one)
    # Before, these differed in their first weights only.
    noise = seeded("--seed_everything=1", "--model.seed=0")
    order = seeded("--seed_everything=1", "--data.seed=0")
    assert (seeds(noise), seeds(order)) == ((1, 0, 1), (1, 1, 0))
    assert len({tuple(losses(folder)) for folder in (one, noise, order)}) == 3


def test_a_run_without_a_global_seed_has_the_seed_zero(seeded):
    assert seeds(seeded("--seed_everything=false")) == (False, 0, 0)


def test_a_resumed_run_keeps_its_seeds(seeded):
    folder = seeded("--seed_everything=3")
    more = seeded("--seed_everything=3", "--ckpt_path=last", "--trainer.max_steps=3")
    assert more == folder
    assert seeds(folder) == (3, 3, 3)


def test_in_python_the_seeds_are_zero_whatever_the_global_state(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    torch.manual_seed(5)
    assert (LitDiffusion().seed, DataModule().seed) == (0, 0)
    assert LitDiffusion(seed=2).hparams["seed"] == 2
