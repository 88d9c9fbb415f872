"""Every overlay's objective is its paper's loss; the formulas are written out as in the papers.

A paper's loss is a factor on the squared error of a target under a density of noise levels. The
tables below have factor, target and density; nothing of them comes from the library.
"""

import math
from pathlib import Path

import pytest
import torch
import yaml

import lit_diffusion as ld
from lit_diffusion.published import PUBLISHED
from lit_diffusion.registry import arguments
from lit_diffusion.weightings import FactorWeighting

F64 = torch.float64
CONFIGS = Path(__file__).parents[1] / "configs"
LAMBDA = torch.linspace(-9.9, 9.1, 381, dtype=F64)  # within the range of every chain
FAMILIES = (ld.SCHEDULES, ld.WEIGHTINGS, ld.PREDICTIONS, ld.SAMPLERS, ld.DECODERS)


def made(value):
    """The object of a config, by the names of its classes."""
    if isinstance(value, dict) and "class_path" in value:
        given = {name: made(each) for name, each in value.get("init_args", {}).items()}
        name = value["class_path"]
    elif isinstance(value, str):
        given, name = {}, value
    else:
        return value
    (cls,) = (family[name] for family in FAMILIES if name in family)
    return cls(**given)


def overlay(path):
    return {name: made(part) for name, part in yaml.safe_load(path.read_text())["model"].items()}


# The papers ------------------------------------------------------------------------------------


def target_error(target, logsnr):
    """‖target error‖² / ‖ε error‖², in the paper's own symbols."""
    alpha, sigma = torch.sigmoid(logsnr).sqrt(), torch.sigmoid(-logsnr).sqrt()
    t = torch.sigmoid(-logsnr / 2)  # of the flow path: (1 − t)/t = α/σ
    s = sigma / alpha  # EDM's noise level, z/α = x + sε
    return {
        "eps": torch.ones_like(logsnr),
        "x": (sigma / alpha) ** 2,  # σ ε̂ + α x̂ = σ ε + α x
        "v": 1 / alpha**2,  # ε̂ = σz + αv̂
        "flow": 1 / (1 - t) ** 2,
        "D": s**2,  # EDM's denoiser, D = x̂, y + sn: s ε̂ + D = s ε + y
    }[target]


def density(name, logsnr):
    def normal(mean, std):
        return torch.exp(-0.5 * ((logsnr - mean) / std) ** 2)

    t = torch.sigmoid(-logsnr / 2)
    if name == "mode":  # Eq. 20: f(u) = 1 − u − s(cos²(πu/2) − 1 + u), by finite differences
        u = torch.linspace(0, 1, 2_000_001, dtype=F64)
        f = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
        of_t = u.flip(0)[torch.searchsorted(f.flip(0), t).clamp(1, len(u) - 1)]
        rate = 1 + 1.29 * (1 - math.pi / 2 * torch.sin(math.pi * of_t))
        return t * (1 - t) / rate
    return {
        "any": torch.ones_like(logsnr),
        "cosine": 1 / torch.cosh(logsnr / 2),
        "uniform t": t * (1 - t),  # |dt/dλ|, up to a factor
        "edm": normal(2.4, 2.4),  # ln s ~ N(−1.2, 1.2²), λ = −2 ln s
        "sd3": normal(0.0, 2.0),  # ln(t/(1 − t)) ~ N(0, 1), λ = −2 ln(t/(1 − t))
        "jit": normal(-1.6, 1.6),  # ln((1 − t)/t) ~ N(−0.8, 0.8²)
        # Eq. 19's cosmap: π(t) = 2/(π − 2πt + 2πt²), and dt = t(1 − t) dλ/2
        "cosmap": t * (1 - t) / (1 - 2 * t + 2 * t**2),
    }[name]


def edm_factor(logsnr):
    s = torch.exp(-logsnr / 2)
    return (s**2 + 0.25) / (s * 0.5) ** 2


def edm_weight(logsnr):
    return edm_factor(logsnr) * target_error("D", logsnr) * density("edm", logsnr)


def edm_monotonic(logsnr):
    grid = torch.linspace(-3.4, -3.2, 200_001, dtype=F64)
    top = float(grid[edm_weight(grid).argmax()])
    return edm_weight(logsnr.clamp(min=top))


def one(logsnr):
    return torch.ones_like(logsnr)


def jit_factor(logsnr):
    """‖x̂ − x‖²/max(1 − t, 0.05)², t the paper's."""
    t = torch.sigmoid(logsnr / 2)
    return (1 - t).clamp(min=0.05) ** -2


SNR = torch.exp
PAPERS = {
    # The factor, its target and the density of each overlay.
    "density": (one, "eps", "cosine"),
    "debiased": (lambda at: 1 / SNR(at).sqrt(), "eps", "cosine"),
    "edm": (edm_factor, "D", "edm"),
    "edm-monotonic": (edm_monotonic, "eps", "any"),
    "elbo": (one, "eps", "any"),
    "exponential": (one, "v", "cosine"),
    "flow-matching": (one, "flow", "uniform t"),
    "iddpm": (one, "eps", "cosine"),
    "indi": (one, "x", "uniform t"),
    "jit": (jit_factor, "x", "jit"),
    "max-snr": (lambda at: SNR(at).clamp(min=1), "x", "cosine"),
    "min-snr": (lambda at: SNR(at).clamp(max=5), "x", "cosine"),
    "p2": (lambda at: 1 / (1 + SNR(at)), "eps", "cosine"),
    "sd3": (one, "flow", "sd3"),
    "sd3-cosmap": (one, "flow", "cosmap"),
    "sd3-mode": (one, "flow", "mode"),
    "sech": (one, "eps", "cosine"),
    "sigmoid": (lambda at: torch.sigmoid(2 - at), "eps", "any"),
    "soft-min-snr": (lambda at: SNR(at) * 4 / (SNR(at) + 4), "x", "edm"),
    "v-cosine": (lambda at: SNR(at) + 1, "x", "cosine"),
    "vdm": (one, "eps", "any"),
}
CHAINS = {"ddpm": one, "p2": lambda at: 1 / (1 + SNR(at))}  # on ε, over DDPM's thousand levels


def constant(ratio, tolerance=1e-6):
    return float((ratio / ratio[len(ratio) // 2] - 1).abs().max()) < tolerance


def paper_weight(name, logsnr):
    factor, target, p = PAPERS[name]
    return factor(logsnr) * target_error(target, logsnr) * density(p, logsnr)


def overlays(folder):
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


@pytest.mark.parametrize("name", sorted(set(overlays("objective")) - set(CHAINS)))
def test_an_objective_has_the_weight_of_its_paper(name, configs):
    ours = overlay(configs / "objective" / f"{name}.yaml")["weighting"](LAMBDA)
    assert constant(ours / paper_weight(name, LAMBDA))


@pytest.mark.parametrize("name", overlays("weighting"))
def test_a_weighting_has_that_of_its_paper(name, configs):
    ours = overlay(configs / "weighting" / f"{name}.yaml")["weighting"](LAMBDA)
    # The times of mode sampling have no closed form: here they come from a grid.
    assert constant(ours / paper_weight(name, LAMBDA), 1e-4 if name == "sd3-mode" else 1e-6)


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_has_the_loss_of_its_paper_at_every_level(name, configs):
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    levels = torch.log(table / (1 - table))
    assert overlay(configs / "objective" / f"{name}.yaml")["num_timesteps"] == 999
    weighting = overlay(configs / "objective" / f"{name}.yaml")["weighting"]
    width = 999 * torch.expm1(levels[:-1] - levels[1:])
    factor = weighting(levels[1:]) * width
    assert torch.allclose(factor, CHAINS[name](levels[1:]), rtol=1e-6)


@pytest.mark.parametrize("name", sorted(set(overlays("objective")) & set(PUBLISHED)))
def test_the_table_of_the_library_is_the_overlays(name, configs):
    model, found = overlay(configs / "objective" / f"{name}.yaml"), PUBLISHED[name]
    logsnr = LAMBDA[(LAMBDA > -5) & (LAMBDA < 9)]
    assert torch.allclose(model["weighting"](logsnr), found.weight_at(logsnr))
    assert model["schedule"].ends == pytest.approx(found.schedule.ends, abs=1e-4)
    assert model["prediction"] == found.prediction
    assert model["num_timesteps"] == found.num_timesteps


def test_an_overlay_of_weightings_sets_the_weighting_alone(configs):
    for path in configs.glob("weighting/*.yaml"):
        config = yaml.safe_load(path.read_text())
        assert list(config) == ["model"], path
        assert list(config["model"]) == ["weighting"], path


def test_an_overlay_of_weightings_leaves_no_argument_to_others(configs):
    # An argument that is left out would be inherited from an earlier file that has it.
    for path in configs.glob("weighting/*.yaml"):
        config = yaml.safe_load(path.read_text())["model"]["weighting"]
        weighting = made(config)
        given = set(config["init_args"]) if isinstance(config, dict) else set()
        assert given == set(arguments(weighting)), path


def test_every_weighting_has_an_overlay(configs):
    named = {type(overlay(path)["weighting"]) for path in configs.glob("weighting/*.yaml")}
    ours = {cls for cls in ld.WEIGHTINGS.classes() if cls.__module__.startswith("lit_diffusion.")}
    # A chain's need its number of steps in the loss, and a shift needs a size of images.
    left = {"VariationalWeighting", "PosteriorMeanWeighting", "ShiftedWeighting"}
    assert {cls.__name__ for cls in ours - named} == left


def test_an_overlay_says_what_it_sets(configs):
    for path in configs.glob("objective/*.yaml"):
        head = " ".join(path.read_text().split("model:")[0].replace("#", "").split())
        said = head.partition("Sets ")[2].split(";")[0]
        assert said, path
        for key in yaml.safe_load(path.read_text())["model"]:
            assert key in said, (path, key)


# The family ------------------------------------------------------------------------------------

SNR_FAMILY = [cls for cls in ld.WEIGHTINGS.classes() if issubclass(cls, FactorWeighting)]
REFERENCES = [
    ld.BetaSchedule(),
    ld.CosineSchedule(),
    ld.FlowSchedule(mode_scale=1.29),
    ld.LaplaceSchedule(scale=2.0),
    ld.LinearSchedule(-10.2, 9.3),
    ld.NormalSchedule(),
    ld.ShiftedSchedule(shift=-2.0),
    ld.TableSchedule(),
]


@pytest.mark.parametrize("schedule", REFERENCES, ids=lambda each: type(each).__name__)
@pytest.mark.parametrize("cls", SNR_FAMILY, ids=lambda cls: cls.__name__)
def test_under_its_own_density_the_loss_is_half_the_published_one(cls, schedule):
    weighting = cls(schedule=schedule)
    logsnr, log_prob = schedule.at(torch.linspace(0.01, 0.99, 99, dtype=F64))
    ratio = weighting(logsnr) / log_prob.exp()
    assert torch.allclose(ratio, weighting.factor(logsnr), rtol=1e-6)


@pytest.mark.parametrize("prediction", [ld.EpsPrediction(), ld.XPrediction(), ld.VPrediction(),
                                        ld.FlowPrediction(), ld.EDMPrediction(0.5)])  # fmt: skip
def test_a_plain_loss_on_any_target_under_any_density(prediction):
    schedule = ld.NormalSchedule(-1.0, 2.0)
    loss = ld.DiffusionLoss(schedule, ld.DensityWeighting(schedule, prediction=prediction))
    x, eps = torch.randn(2, 64, 5, dtype=F64)
    t = torch.rand(64, dtype=F64)
    logsnr, _ = schedule.at(t)

    def denoiser(z, logsnr):
        return prediction.decode(torch.tanh(3 * z), z, logsnr)

    z = ld.diffuse(x, eps, logsnr)
    published = (torch.tanh(3 * z) - prediction.target(x, eps, logsnr)).square().mean(1)
    assert torch.allclose(2 * loss(denoiser, x, t=t, eps=eps).loss, published, rtol=1e-6)


def test_cosmap_is_the_cosine_schedule():
    # Esser et al. 2024: t = 1 − 1/(tan(πu/2) + 1), chosen to match the cosine schedule.
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = 1 - 1 / (torch.tan(math.pi / 2 * u) + 1)
    wide = ld.CosineSchedule(-60.0, 60.0)
    assert torch.allclose(wide.logsnr(u), 2 * torch.log((1 - t) / t), atol=1e-9)


def test_mode_sampling_is_eq_20():
    u = torch.linspace(0.001, 0.999, 999, dtype=F64)
    t = 1 - u - 1.29 * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)
    wide = ld.FlowSchedule(-60.0, 60.0, mode_scale=1.29)
    assert torch.allclose(wide.logsnr(1 - u), 2 * torch.log((1 - t) / t), atol=1e-9)


def test_debiased_under_the_cosine_is_the_sigmoid_with_bias_zero():
    assert constant(ld.DebiasedWeighting()(LAMBDA) / ld.SigmoidWeighting(0.0)(LAMBDA))


def test_the_density_matters():
    """P2 on its own chain and in the cosine's table are different objectives."""
    chain = ld.P2Weighting(schedule=ld.BetaSchedule())(LAMBDA)
    ratio = chain / ld.P2Weighting()(LAMBDA)
    assert float(ratio.max() / ratio.min()) > 10


def test_a_learned_shape_follows_the_gradient_of_the_density():
    # d log p/dλ of the cosine density is −½ tanh(λ/2).
    logsnr = LAMBDA.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ld.CosineSchedule().log_prob(logsnr).sum(), logsnr)
    assert torch.allclose(slope, -0.5 * torch.tanh(LAMBDA / 2), atol=1e-8)
    assert not ld.CosineSchedule().log_prob(LAMBDA).requires_grad


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.P2Weighting(gamma=-1.0), "gamma must be 0 or more and k above 0"),
        (lambda: ld.P2Weighting(k=0.0), "k above 0"),
        (lambda: ld.MinSNRWeighting(0.0), "MinSNRWeighting: gamma must be above 0"),
        (lambda: ld.MaxSNRWeighting(-2.0), "MaxSNRWeighting: gamma must be above 0"),
        (lambda: ld.JiTWeighting(t_min=0.0), "t_min must be in"),
        (lambda: ld.DebiasedWeighting(num_timesteps=0), "DebiasedWeighting: num_timesteps"),
        (lambda: ld.FlowSchedule(mode_scale=2.0), "below 2/"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
