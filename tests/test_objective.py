"""What an objective does: the curves, the theorem, the names, and the command that tells them.

Kingma & Gao 2023 (arXiv:2303.00848): theorem 1, table 1. Gaussian data stand for all others, as
their best denoiser and its bound are known.
"""

import math
import sys

import pytest
import torch
import yaml

import lit_diffusion as ld
from lit_diffusion import __main__ as command_line
from lit_diffusion.nn import ResidualMLP
from lit_diffusion.objective import Objective, gaussian_error
from lit_diffusion.published import PUBLISHED, nearest_published, objective_distance
from lit_diffusion.training import LitDiffusion
from lit_diffusion.training.reporting.objective import save_objective

OVERLAYS = (
    "ddpm",
    "edm-monotonic",
    "edm",
    "flow-matching",
    "iddpm",
    "indi",
    "jit",
    "min-snr",
    "p2",
    "sd3",
    "sigmoid",
    "v-cosine",
    "vdm",
)


def ours(family):
    return [cls for cls in family.classes() if cls.__module__.startswith("lit_diffusion.")]


OURS = ours(ld.WEIGHTINGS)
MONOTONE = {
    "DebiasedWeighting": True,
    "DensityWeighting": False,
    "EDMWeighting": False,
    "ELBOWeighting": True,
    "ExponentialWeighting": True,
    "InDIWeighting": True,
    "JiTWeighting": False,
    "MaxSNRWeighting": True,
    "MinSNRWeighting": False,
    "MonotoneWeighting": True,
    "P2Weighting": False,
    "PosteriorMeanWeighting": True,
    "SechWeighting": False,
    "ShiftedWeighting": True,
    "SigmoidWeighting": True,
    "SoftMinSNRWeighting": False,
    "VariationalWeighting": True,
}


def objective(weighting, schedule=None, prediction=None, num_timesteps=None):
    schedule = ld.CosineSchedule() if schedule is None else schedule
    prediction = ld.EpsPrediction() if prediction is None else prediction
    return Objective(schedule, weighting, prediction, num_timesteps)


# Curves --------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("schedule", [ld.CosineSchedule(), ld.KarrasSchedule()], ids=repr)
def test_the_error_of_any_target_is_weighed_alike(cls, schedule):
    found = objective(cls(), schedule)
    logsnr = found.logsnr
    for prediction in (member() for member in ours(ld.PREDICTIONS)):
        # A wrong answer, its error by hand in ε and in the target, weighed either way.
        x, eps = torch.full_like(logsnr, 0.3)[:, None], torch.full_like(logsnr, -0.7)[:, None]
        z = ld.diffuse(x, eps, logsnr)
        wrong = prediction.target(x, eps, logsnr) + 0.1
        eps_mse = (prediction.decode(wrong, z, logsnr).eps - eps).square()[:, 0]
        inner = logsnr.abs() < 12  # the target itself loses its digits beyond
        ratio = found.weight_on(prediction) * 0.01 / (found.weight * eps_mse)
        assert torch.allclose(ratio[inner], torch.ones_like(ratio[inner]), atol=1e-5), prediction
    expected = found.weight * logsnr.exp()
    assert torch.allclose(found.weight_on(ld.XPrediction()), expected, rtol=1e-9)
    expected = found.weight * torch.sigmoid(logsnr)
    assert torch.allclose(found.weight_on(ld.VPrediction()), expected, rtol=1e-9)
    assert torch.allclose(found.ratio * found.density, found.weight, rtol=1e-9)


def test_a_chain_multiplies_by_its_steps():
    found = PUBLISHED["ddpm"]
    assert torch.allclose(found.ratio, torch.ones_like(found.ratio), rtol=1e-12)
    x, t = torch.zeros(5, 3), torch.linspace(0.1, 0.9, 5)
    loss = ld.DiffusionLoss(found.schedule, found.weighting, num_timesteps=999)
    terms = loss(ld.GaussianDenoiser(0.5), x, t=t)
    assert torch.allclose(terms.loss, 0.5 * terms.eps_mse)


def test_it_is_a_snapshot():
    schedule = ld.LinearSchedule(-5.0, 13.3, learn=True)
    found = objective(ld.ELBOWeighting(), schedule)
    with torch.no_grad():
        schedule.logsnr_max.add_(1.0)
    assert found.schedule.ends[1] == pytest.approx(13.3, abs=1e-6)
    assert not found.weight.requires_grad
    assert not found.density.requires_grad


@pytest.mark.parametrize("learn", ["shape", "endpoints", "both"])
def test_learned_schedules_are_understood(learn):
    found = objective(ld.SigmoidWeighting(), ld.LearnedSchedule(-15.0, 15.0, learn=learn))
    uniform = objective(ld.SigmoidWeighting(), ld.LinearSchedule(-15.0, 15.0))
    assert found.std_over_mean() == pytest.approx(uniform.std_over_mean(), rel=0.2)
    assert nearest_published(found)[0][0] == "sigmoid"


def test_steps_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1 step, got num_timesteps=0"):
        objective(ld.ELBOWeighting(), num_timesteps=0)


# Likelihood ----------------------------------------------------------------------------------


def test_the_table_is_whole():
    assert {cls.__name__ for cls in OURS} == set(MONOTONE)


@pytest.mark.parametrize("schedule", [ld.CosineSchedule(), ld.LinearSchedule(-10, 13)], ids=repr)
@pytest.mark.parametrize("cls", OURS, ids=lambda cls: cls.__name__)
def test_monotone_as_in_the_table(cls, schedule):
    found = objective(cls(), schedule)
    assert found.monotone == MONOTONE[cls.__name__], found.increasing_intervals()
    falls, rises, clean = found.mixture()
    assert falls.mass + clean == pytest.approx(1)
    assert (rises.mass == 0) == found.monotone
    # All of it together is what w starts with.
    total = falls.mass - rises.mass + clean
    whole = float(found.weight[0]) / (falls.mass + clean)
    assert total * float(found.weight[-1]) == pytest.approx(whole * clean, rel=1e-6, abs=1e-12)
    assert found.meaning().startswith("Training" if found.monotone else "This objective is no")
    if found.monotone:
        assert found.share_increasing() == 0


def test_where_edm_rises():
    ((low, high),) = objective(ld.EDMWeighting()).increasing_intervals()
    assert low == -20
    assert high == pytest.approx(-3.308, abs=0.006)
    assert objective(ld.MonotoneWeighting()).monotone


@pytest.mark.parametrize("name", ["SechWeighting", "MinSNRWeighting", "DensityWeighting"])
def test_where_the_others_rise(name):
    ((low, high),) = objective(ld.WEIGHTINGS[name]()).increasing_intervals()
    assert (low, high) == (-20, pytest.approx(0, abs=0.006))


@pytest.mark.parametrize("name", [name for name, monotone in MONOTONE.items() if monotone])
@pytest.mark.parametrize("schedule", [ld.CosineSchedule(), ld.LinearSchedule(-6, 9)], ids=repr)
def test_theorem(name, schedule):
    """L_w = w(λ_min) E[B(λ)] + const, λ from the augmentation, B the bound of data seen there."""
    found = objective(ld.WEIGHTINGS[name](), schedule)
    # Ten times finer than its own: the sums below are right to the square of the width.
    found.logsnr = logsnr = torch.linspace(*schedule.ends, 80_001, dtype=torch.float64)
    loss = torch.trapezoid(0.5 * found.weight * gaussian_error(logsnr), logsnr)

    def bound(at):
        softplus = torch.nn.functional.softplus
        return 0.5 * (softplus(at - math.log(4)) - softplus(logsnr[0] - math.log(4)))

    mass = found.augmentation_density() * logsnr.diff()
    expected = (mass * (bound(logsnr[1:]) + bound(logsnr[:-1])) / 2).sum()
    expected += found.mixture().clean * bound(logsnr[-1])
    # B(λ_min) is 0 here; elsewhere it is the constant.
    assert float(loss) == pytest.approx(float(found.weight[0] * expected), rel=1e-6)


def test_sigmoid_is_the_elbo_of_data_with_logistic_noise():
    found = objective(ld.SigmoidWeighting(bias=2.0))
    falls, _, clean = found.mixture()
    assert falls.mean == pytest.approx(2, abs=1e-4)
    assert falls.std == pytest.approx(math.pi / math.sqrt(3), abs=1e-3)
    assert clean == pytest.approx(math.exp(-18), rel=1e-6)
    assert found.augmentation_name() == "λ ~ Logistic(2, 1)"
    middle = (found.logsnr[1:] + found.logsnr[:-1]) / 2
    logistic = torch.sigmoid(middle - 2) * torch.sigmoid(2 - middle)
    assert torch.allclose(found.augmentation_density(), logistic, atol=1e-6)
    moved = objective(ld.ShiftedWeighting(ld.SigmoidWeighting(), shift=-2.8))
    assert moved.augmentation_name() == "λ ~ Logistic(−0.8, 1)"


def test_other_augmentations():
    assert "the data themselves" in objective(ld.ELBOWeighting()).meaning()
    name = objective(ld.ExponentialWeighting()).augmentation_name()
    assert name == "λ ~ −20 + Exponential(2)"
    assert "mean 0.54 and std 2.62" in objective(ld.MonotoneWeighting()).augmentation_name()


def test_a_weight_that_is_zero_beyond_a_range_is_no_error():
    inner = ld.DensityWeighting(ld.LinearSchedule(-5.0, 5.0))
    found = objective(inner)
    assert [low for low, _ in found.increasing_intervals()] == [pytest.approx(-5, abs=0.01)]
    assert math.isfinite(found.std_over_mean())
    assert len(nearest_published(found)) == 3


# The estimate --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "weighting", "expected"),
    [
        ("LinearSchedule", "ELBOWeighting", 1.03),
        ("LinearSchedule", "SigmoidWeighting", 2.39),
        ("LinearSchedule", "ExponentialWeighting", 1.76),
        ("CosineSchedule", "ELBOWeighting", 20.06),
        ("CosineSchedule", "SigmoidWeighting", 0.84),
        ("CosineSchedule", "ExponentialWeighting", 0.51),
        ("FlowSchedule", "ELBOWeighting", 16.0),
        ("FlowSchedule", "SigmoidWeighting", 0.87),
        ("FlowSchedule", "ExponentialWeighting", 0.46),
    ],
)
def test_scatter_of_one_draw(schedule, weighting, expected):
    found = objective(ld.WEIGHTINGS[weighting](), ld.SCHEDULES[schedule]())
    assert found.std_over_mean() == pytest.approx(expected, abs=0.006, rel=2e-3)


@pytest.mark.parametrize("num_timesteps", [None, 50])
def test_scatter_is_that_of_the_loss(num_timesteps):
    found = objective(ld.SigmoidWeighting(), ld.LinearSchedule(-8, 8), num_timesteps=num_timesteps)
    loss = ld.DiffusionLoss(found.schedule, found.weighting, num_timesteps=num_timesteps)
    generator = torch.Generator().manual_seed(0)
    x = 0.5 * torch.randn(100_000, 8, generator=generator)
    losses = loss(ld.GaussianDenoiser(0.5), x, generator=generator).loss
    assert float(losses.std() / losses.mean()) == pytest.approx(
        found.std_over_mean(dims=8), rel=0.01
    )


def test_nothing_is_below_the_spread_of_the_noise():
    found = [objective(cls(), ld.NormalSchedule()).std_over_mean() for cls in OURS]
    assert min(found) >= math.sqrt(2 / 192) - 1e-9
    # EDM's F-loss is as large at every level, so its schedule is the best there is for it.
    assert PUBLISHED["edm"].std_over_mean() == pytest.approx(math.sqrt(2 / 192), rel=1e-3)


# Names ---------------------------------------------------------------------------------------


class _Times(ld.Weighting):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor
        self.base = ld.EDMWeighting()

    def forward(self, logsnr):
        return self.factor * self.base(logsnr)


@pytest.mark.parametrize("factor", [1e-6, 1.0, 1e6])
def test_factors_do_not_matter(factor):
    plain = PUBLISHED["edm"]
    found = objective(_Times(factor), plain.schedule, plain.prediction)
    assert found.increasing_intervals() == plain.increasing_intervals()
    for part, expected in zip(found.mixture(), plain.mixture(), strict=True):
        assert part == pytest.approx(expected, rel=1e-9)
    assert found.std_over_mean() == pytest.approx(plain.std_over_mean())
    (name, distance), *_ = nearest_published(found)
    assert name == "edm"
    assert distance.total < 1e-9


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_published_objective_is_its_own_nearest(name):
    (first, distance), (_, second), _ = nearest_published(PUBLISHED[name])
    assert first == name
    assert distance.total == 0
    assert second.total > 1e-3


@pytest.mark.parametrize("name", PUBLISHED)
def test_distances_are_distances(name):
    for other in PUBLISHED.values():
        there, back = (
            objective_distance(PUBLISHED[name], other),
            objective_distance(other, PUBLISHED[name]),
        )
        assert all(0 <= number <= 1 for number in there)
        assert there.weight == pytest.approx(back.weight)
        assert there.density == pytest.approx(back.density)


def test_curves_and_not_classes():
    same = objective(
        ld.ShiftedWeighting(ld.SigmoidWeighting(bias=5.0), shift=-3.0),
        ld.ShiftedSchedule(ld.ShiftedSchedule(shift=1.0), shift=-1.0, logsnr_min=-20),
    )
    (name, distance), *_ = nearest_published(same)
    assert name == "sigmoid"
    assert distance.total < 1e-3


@pytest.mark.parametrize(
    ("weighting", "name", "distance"),
    [
        (ld.SigmoidWeighting(bias=1.0), "sigmoid", 0.12),
        (ld.SigmoidWeighting(bias=2.2), "sigmoid", 0.025),
        (ld.MinSNRWeighting(gamma=6.0), "min-snr", 0.03),
        (ld.P2Weighting(gamma=0.9, schedule=ld.BetaSchedule()), "p2", 0.03),
    ],
)
def test_a_changed_parameter_is_seen(weighting, name, distance):
    schedule = ld.BetaSchedule() if name == "p2" else None  # P2's own density
    (found, away), *_ = nearest_published(objective(weighting, schedule))
    assert found == name
    assert away.weight == pytest.approx(distance, abs=0.01)
    assert away.density == away.prediction == 0


def test_sigmoid_at_three_lies_between_two():
    near = dict(nearest_published(objective(ld.SigmoidWeighting(bias=3.0))))
    assert near["sigmoid"].total == pytest.approx(0.122, abs=1e-3)
    assert near["iddpm"].total == pytest.approx(0.102, abs=1e-3)


def test_what_two_objectives_share():
    v, flow = PUBLISHED["v-cosine"], PUBLISHED["flow-matching"]
    weight, density, prediction = objective_distance(v, flow)
    assert weight < 1e-12
    assert density > 0.05
    assert prediction > 0.1
    apart = objective_distance(
        objective(ld.ELBOWeighting(), ld.LinearSchedule(-9, -8)),
        objective(ld.ELBOWeighting(), ld.LinearSchedule(8, 9)),
    )
    assert apart == pytest.approx((1.0, 1.0, 1.0), abs=1e-2)


# The command ---------------------------------------------------------------------------------


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Run `lit-diffusion objective` in an empty folder; the exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command adds this folder

    def runs(*words):
        monkeypatch.setattr(sys, "argv", ["lit-diffusion", "objective", *map(str, words)])
        code = 0
        try:
            command_line.main()
        except SystemExit as stop:
            code = stop.code
        return (code, *capsys.readouterr())

    return runs


@pytest.mark.parametrize("name", OVERLAYS)
def test_overlays_come_out_under_their_own_names(name, run, configs):
    code, out, _ = run("-c", configs / "digits.yaml", "-c", configs / f"objective/{name}.yaml")
    assert code == 0
    assert f"It is a published objective: {name}." in out
    assert max(map(len, out.splitlines())) <= 80


def test_there_is_no_other_overlay(configs):
    assert sorted(path.stem for path in configs.glob("objective/*.yaml")) == sorted(OVERLAYS)


def test_plain_words(run):
    code, out, _ = run("--model.weighting", "SigmoidWeighting", "--model.weighting.bias", "1")
    text = " ".join(out.split())
    assert code == 0
    assert "the ELBO of the data with Gaussian noise added at λ ~ Logistic(1, 1)" in text
    assert "Nearest published objective: sigmoid, distance 0.17 (weight 0.12," in text


def test_a_signed_mixture_is_called_one(run, configs):
    _, out, _ = run("-c", configs / "objective/edm.yaml")
    text = " ".join(out.split())
    assert "not an ELBO under noise augmentation: w increases on [−20, −3.31]" in text
    assert "signed mixture" in text


def test_every_config_and_every_key_of_fit(run, configs, tmp_path):
    (tmp_path / "whole.yaml").write_text(
        yaml.safe_dump({"ckpt_path": "last", "seed_everything": True, "name": "a", "plugins": []})
    )
    for config in sorted(configs.glob("*.yaml")):
        code, out, err = run("-c", config, "-c", tmp_path / "whole.yaml")
        assert code == 0, err
        assert out.startswith("Objective: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole.yaml"]


def test_plug_ins(run, tmp_path):
    (tmp_path / "plug_in_of_objective.py").write_text(
        "from lit_diffusion import Weighting\n"
        "class _Hidden(Weighting):\n    pass\n"
        "class OnesWeighting(Weighting):\n"
        "    def forward(self, logsnr):\n        return 3 + 0 * logsnr\n"
    )
    words = ("--plugins", "plug_in_of_objective", "--model.weighting", "OnesWeighting")
    code, out, err = run(*words, "--model.schedule", "LearnedSchedule")
    assert code == 0, err
    assert "Objective: OnesWeighting(), sampled from LearnedSchedule(" in out
    assert "the ELBO of the data themselves" in out
    assert "Nearest published objective: vdm" in out


@pytest.mark.parametrize("suffix", ["png", "pdf"])
@pytest.mark.parametrize("name", ["sigmoid", "vdm", "edm", "ddpm"])
def test_figure(name, suffix, tmp_path):
    path = tmp_path / "folder" / f"objective.{suffix}"
    save_objective(PUBLISHED[name], path)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes().startswith(b"\x89PNG" if suffix == "png" else b"%PDF")


def test_figure_of_the_command(run, configs, tmp_path):
    code, out, _ = run("-c", configs / "objective/vdm.yaml", "--out", "objective.png")
    assert code == 0
    assert out.splitlines()[-1] == "Figure: objective.png"
    assert (tmp_path / "objective.png").read_bytes().startswith(b"\x89PNG")


def test_half_a_figure_is_none(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fails(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fails)
    with pytest.raises(OSError, match="disk full"):
        save_objective(PUBLISHED["vdm"], tmp_path / "objective.png")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_asked_as_it_is_now(run, tmp_path):
    import lightning as L

    model = LitDiffusion(
        network=ResidualMLP(shape=(1, 1, 2)),
        schedule=ld.LinearSchedule(-5.0, 13.3, learn=True),
        decoder=ld.SoftmaxDecoder(levels=256),
        shape=(1, 1, 2),
    )
    with torch.no_grad():
        model.loss.schedule.logsnr_min.fill_(-7.5)
    trainer = L.Trainer(
        logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path
    )
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    code, out, err = run("--ckpt_path", "model.ckpt")
    assert code == 0, err
    assert "LinearSchedule(logsnr_min=-7.5" in " ".join(out.split())
    assert "Nearest published objective: vdm" in out
    code, _, err = run("--ckpt_path", "model.ckpt", "--model.weighting", "EDMWeighting")
    assert code == 2
    assert "give --ckpt_path or --model.weighting, not both" in err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--model.weighting", "SigmoidWeigthing"], "Did you mean SigmoidWeighting"),
        (["--model.weighting", "SigmoidWeighting", "--model.weighting.bais", "1"], "bais"),
        (["--out", "objective.jpg"], "--out must be a .png, .pdf or .svg file, got objective.jpg"),
        (["-c", "nowhere.yaml"], "nowhere.yaml"),
        (["--ckpt_path", "nowhere.ckpt"], "No checkpoint at nowhere.ckpt"),
        (["--ckpt_path", "last"], "there is no checkpoint below runs;"),
        (["--model.num_timesteps", "0"], "at least 1 step"),
        (["--model.schedule", "LearnedSchedule", "--model.schedule.learn", "both"], "decoder"),
    ],
)
def test_mistakes_are_one_line(words, expected, run, tmp_path):
    code, out, err = run(*words)
    assert code == 2
    assert not out
    assert expected in err
    assert err.startswith("lit-diffusion: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
