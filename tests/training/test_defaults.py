"""What nobody asked for is a sound choice: the default objective, and `fit` without a config."""

import pytest
import yaml

import lit_diffusion as ld
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.commands.fit_setup.without_config import MAX_STEPS


def test_the_default_objective_fits_its_schedule():
    loss = ld.DiffusionLoss()
    found = ld.Objective(loss.schedule, loss.weighting, ld.VPrediction())
    assert found.std_over_mean() < 1  # w = 1 under the same cosine: 20
    assert found.monotone
    model = LitDiffusion(shape=(1, 8, 8))
    assert repr(model.loss.weighting) == repr(loss.weighting)
    assert repr(model.loss.schedule) == repr(loss.schedule)


def test_with_a_decoder_the_default_is_the_bound():
    loss = ld.DiffusionLoss(ld.LinearSchedule(-5.0, 13.3, learn=True), decoder=ld.SoftmaxDecoder())
    assert isinstance(loss.weighting, ld.ELBOWeighting)


def trainer(cli, *words):
    code, out, err = cli("fit", *words, "--print_config")
    assert code == 0, err
    found = yaml.safe_load(out)["trainer"]
    names = [one["class_path"].rpartition(".")[2] for one in found["callbacks"] or []]
    return found["max_steps"], names


@pytest.mark.parametrize(
    ("words", "steps", "callbacks"),
    [
        ([], MAX_STEPS, ["EMA", "SampleGrid"]),
        (["--trainer.max_steps=7"], 7, ["EMA", "SampleGrid"]),
        (["--trainer.max_epochs=2"], -1, ["EMA", "SampleGrid"]),
        (["--trainer.callbacks+=Averages"], MAX_STEPS, ["EMA", "SampleGrid", "Averages"]),
        (["--trainer.callbacks=[]"], MAX_STEPS, []),
    ],
)  # fmt: skip
def test_fit_without_a_config_ends_averages_and_samples(cli, words, steps, callbacks):
    assert trainer(cli, *words) == (steps, callbacks)


def test_a_config_says_everything_itself(cli, tmp_path):
    (tmp_path / "own.yaml").write_text("name: own\n")
    assert trainer(cli, "--config", tmp_path / "own.yaml") == (-1, [])
