"""Models of diffusers: as networks here, and published pipelines with chain and sampler."""

import json
import sys

import pytest
import torch
from torch.nn import functional as F

import lit_diffusion as ld
from lit_diffusion.description import build, describe
from lit_diffusion.registry import arguments

diffusers = pytest.importorskip(
    "diffusers", reason="needs diffusers: pip install 'lit-diffusion[diffusers]'"
)

UNET = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": None,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 2,
    "norm_num_groups": 4,
    "patch_size": 2,
}
SHAPE, B = (3, 8, 8), 4


def network(model, num_classes=None, **arguments):
    """A small one, all of whose parameters matter."""
    torch.manual_seed(0)
    config = UNET if model == "UNet2DModel" else DIT
    net = ld.DiffusersNetwork(model, config, num_classes, SHAPE, **arguments)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


@pytest.fixture(params=["UNet2DModel", "DiTTransformer2DModel"])
def model(request):
    return request.param


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(B, *SHAPE), torch.tensor([-12.0, -3.0, 2.0, 15.0])


# The network ------------------------------------------------------------------------------------


def test_it_is_the_model_at_its_timesteps(model, inputs):
    z, _ = inputs
    net = network(model, num_classes=5)
    t, label = torch.tensor([0, 999, 17, 500]), torch.tensor([4, 0, 2, 2])
    logsnr = ld.BetaSchedule().logsnr(t.double() / 999).float()
    assert torch.equal(net.timestep(logsnr), t.float())
    assert torch.equal(net(z, logsnr, label), net.network(z, t, label).sample)


def test_a_unet_takes_any_size_that_it_can_halve(inputs):
    unet, dit = network("UNet2DModel"), network("DiTTransformer2DModel")
    z, logsnr = torch.randn(B, 3, 12, 6), inputs[1]
    unet.check_shape(z.shape[1:])
    assert unet(z, logsnr).shape == z.shape
    with pytest.raises(ValueError, match="multiples of 2, got 7x8"):
        unet.check_shape((3, 7, 8))
    with pytest.raises(ValueError, match="3 channels and any size, got"):
        unet.check_shape((1, 8, 8))
    dit.check_shape(SHAPE)
    with pytest.raises(ValueError, match=r"the size \(8, 8\), got \(3, 16, 16\)"):
        dit.check_shape((3, 16, 16))


def test_timesteps_fall_with_the_level_far_beyond_the_chain():
    net = network("UNet2DModel")
    logsnr = torch.linspace(-20, 20, 4001)
    t = net.timestep(logsnr)
    assert t.dtype == torch.float32
    assert bool((t.diff() < 0).all())
    assert t[0] > 999
    assert t[-1] < 0
    inner = (t >= 0) & (t <= 999)
    exact = 999 * ld.BetaSchedule().time(logsnr)
    assert torch.allclose(t[inner].double(), exact[inner], rtol=0, atol=0.1)


@pytest.mark.parametrize("timesteps", [2, 50, 1000])
def test_every_level_of_a_chain_is_met_exactly(timesteps):
    schedule = ld.CosineSchedule(-9.0, 11.0)
    net = network("UNet2DModel", schedule=schedule, timesteps=timesteps)
    levels = schedule.logsnr(torch.linspace(0, 1, timesteps, dtype=torch.float64))
    assert torch.equal(net.timestep(levels), torch.arange(timesteps).float())


def test_examples_do_not_mix_and_labels_matter(model, inputs):
    z, logsnr = inputs
    net = network(model, num_classes=5)
    label = torch.tensor([4, -1, 0, 2])
    whole = net(z, logsnr, label)
    assert whole.shape == z.shape
    for i in range(B):
        alone = net(z[i : i + 1], logsnr[i : i + 1], label[i : i + 1])
        assert torch.allclose(alone, whole[i : i + 1], atol=1e-5)
    other = net(z, logsnr, torch.tensor([3, -1, 1, 1]))
    changed = (whole - other).flatten(1).abs().amax(1) > 1e-4
    assert changed.tolist() == [True, False, True, True]


def test_no_label_is_minus_one_and_a_row_of_its_own(model, inputs):
    z, logsnr = inputs
    net = network(model, num_classes=5)
    none = net(z, logsnr)
    assert torch.equal(none, net(z, logsnr, torch.full((B,), -1)))
    for label in range(5):
        assert not torch.allclose(none, net(z, logsnr, torch.full((B,), label)), atol=1e-4)


def test_without_classes_there_are_no_labels(model, inputs):
    z, logsnr = inputs
    net = network(model)
    assert net(z, logsnr).shape == z.shape
    with pytest.raises(ValueError, match="without classes"):
        net(z, logsnr, torch.zeros(B, dtype=torch.long))


def test_only_our_label_dropout_hides_labels(inputs):
    z, logsnr = inputs
    net = network("DiTTransformer2DModel", num_classes=5).train()
    label = torch.zeros(B, dtype=torch.long)
    first = net(z, logsnr, label)
    for _ in range(20):  # diffusers' own would hide 8 of these 80
        assert torch.equal(net(z, logsnr, label), first)


def test_the_type_is_that_of_the_images(inputs):
    z, logsnr = inputs
    with torch.autocast("cpu", torch.bfloat16):
        assert network("UNet2DModel")(z, logsnr).dtype == torch.float32
    net = network("UNet2DModel").to(torch.bfloat16)
    assert net(z.bfloat16(), logsnr.bfloat16()).dtype == torch.bfloat16
    levels = ld.BetaSchedule().logsnr(torch.tensor([0.0, 1.0])).float()
    assert net.timestep(levels).tolist() == [0, 999]  # the table was not rounded with the weights


def test_it_can_be_described_and_made_again(model, inputs):
    z, logsnr = inputs
    schedule = ld.CosineSchedule(-9.0, 11.0)
    net = network(model, num_classes=5, schedule=schedule, timesteps=100)
    described = json.loads(json.dumps(describe(net)))
    assert described["class_path"] == "lit_diffusion.DiffusersNetwork"
    again = build(described).eval()
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(z, logsnr), net(z, logsnr))
    assert describe(again) == described


def test_a_null_of_the_config_is_not_its_default():
    """attention_head_dim: null means one head, and the default is heads of 8 channels."""
    config = UNET | {"_class_name": "UNet2DModel", "_diffusers_version": "0.1"}
    net = ld.DiffusersNetwork(config=config, shape=SHAPE)
    assert net.network.mid_block.attentions[0].heads == 1
    eight = ld.DiffusersNetwork(config=UNET | {"attention_head_dim": 8}, shape=SHAPE)
    assert eight.network.mid_block.attentions[0].heads == 2


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"model": "UNet2DConditionModel"}, "UNet2DModel or DiTTransformer2DModel, got"),
        ({"timesteps": 1}, "timesteps must be at least 2, got 1"),
        ({"config": UNET | {"in_channels": 1}}, "expected in_channels=3"),
        ({"config": UNET | {"num_class_embeds": 5}}, "expected num_class_embeds=None"),
        ({"config": UNET | {"time_embedding_type": "fourier"}}, "expected time_embedding_type"),
        ({"config": UNET | {"width": 5}}, "UNet2DModel cannot be made.*width"),
        ({"config": UNET | {"block_out_channels": [8, 16, 32]}}, "UNet2DModel cannot be made"),
        ({"shape": (3, 9, 8)}, "multiples of 2, got 9x8"),
        (
            {"model": "DiTTransformer2DModel", "config": DIT, "shape": (3, 8, 4)},
            "square images.*got 8x4",
        ),
        (
            {"model": "DiTTransformer2DModel", "config": DIT | {"patch_size": 3}},
            "a multiple of patch_size=3, got 8x8",
        ),
    ],
)
def test_what_does_not_fit_is_refused(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        ld.DiffusersNetwork(**{"config": UNET, "shape": SHAPE, **arguments})


def test_without_diffusers_one_line_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lit-diffusion\[diffusers\]'"):
        ld.DiffusersNetwork(config=UNET)


# Published pipelines ----------------------------------------------------------------------------


def pipeline(folder, scheduler, **config):
    """A pipeline's folder, written by diffusers itself, and its parts."""
    torch.manual_seed(0)
    channels, side, _ = SHAPE
    unet = diffusers.UNet2DModel(
        sample_size=side, in_channels=channels, out_channels=channels, **(UNET | config)
    ).eval()
    kind = diffusers.DDPMPipeline
    kind = diffusers.DDIMPipeline if isinstance(scheduler, diffusers.DDIMScheduler) else kind
    kind(unet=unet, scheduler=scheduler).save_pretrained(folder)
    return unet


def in_double(scheduler):
    """Without the rounding of their float32 products, which is all that they lose."""
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    return scheduler


@torch.no_grad()
def walk(scheduler, unet, z, **arguments):
    """Diffusers' own loop."""
    for t in scheduler.timesteps:
        z = scheduler.step(unet(z, t).sample, t, z, **arguments).prev_sample.float()
    return z


@torch.no_grad()
def ours(model, z, generator=None):
    denoiser = ld.ClippedDenoiser(model.denoiser) if model.clip_denoised else model.denoiser
    return model.sampler(denoiser, z, generator)


NOISE = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3))
CHAINS = {
    "linear": {"beta_schedule": "linear", "beta_end": 0.2},
    "scaled": {"beta_schedule": "scaled_linear", "beta_end": 0.2},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "sigmoid": {"beta_schedule": "sigmoid", "beta_end": 0.2},
    "own": {"trained_betas": [0.01 * 1.03**i for i in range(100)]},
}


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_small_log", "fixed_large"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("clip_denoised", [True, False])
def test_ddpm_draws_the_same_images(tmp_path, variance, kind, clip_denoised):
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=100,
        variance_type=variance,
        prediction_type=kind,
        clip_sample=clip_denoised,
        **CHAINS["linear"],
    )
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    assert model.clip_denoised is clip_denoised
    theirs = walk(in_double(scheduler), unet, NOISE, generator=torch.Generator().manual_seed(5))
    drawn = ours(model, NOISE, torch.Generator().manual_seed(5))
    scale = float(theirs.abs().max())
    assert float((drawn - theirs).abs().max()) < 1e-5 * max(1.0, scale)


@pytest.mark.parametrize("chain", CHAINS)
def test_every_chain_has_its_levels_here(tmp_path, chain):
    scheduler = in_double(diffusers.DDPMScheduler(num_train_timesteps=100, **CHAINS[chain]))
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    expected = torch.logit(scheduler.alphas_cumprod)
    levels = model.schedule.logsnr(torch.linspace(0, 1, 100, dtype=torch.float64))
    assert torch.allclose(levels, expected, rtol=0, atol=1e-4)
    assert torch.equal(model.network.timestep(levels), torch.arange(100).float())
    assert (model.num_timesteps, model.sampler.steps) == (99, 100)
    theirs = walk(scheduler, unet, NOISE, generator=torch.Generator().manual_seed(5))
    drawn = ours(model, NOISE, torch.Generator().manual_seed(5))
    assert torch.allclose(drawn, theirs, rtol=0, atol=1e-5)


def test_famous_chains_are_called_by_their_names(tmp_path):
    """So that a config says what they are, and not a thousand numbers."""
    pipeline(tmp_path / "ddpm", diffusers.DDPMScheduler())
    pipeline(tmp_path / "iddpm", diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    ddpm, iddpm = (ld.from_diffusers(tmp_path / name) for name in ("ddpm", "iddpm"))
    assert repr(ddpm.schedule) == repr(ld.BetaSchedule())
    assert repr(iddpm.schedule) == repr(ld.TableSchedule())


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_ddim_draws_the_same_images(tmp_path, spacing, kind):
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=200, timestep_spacing=spacing, prediction_type=kind, **CHAINS["linear"]
    )
    unet = pipeline(tmp_path, scheduler)
    with pytest.warns(UserWarning, match="clip_sample=True"):
        model = ld.from_diffusers(tmp_path)
    scheduler.set_timesteps(50)
    visited = model.network.timestep(model.sampler.levels())
    assert torch.allclose(visited, scheduler.timesteps.float(), rtol=0, atol=1e-4)
    if spacing == "linspace":
        return  # there theirs moves by 200 // 50 timesteps, and then asks at another one
    theirs = walk(in_double(scheduler), unet, NOISE, use_clipped_model_output=True)
    assert torch.allclose(ours(model, NOISE), theirs, rtol=0, atol=1e-5)


def test_ddim_without_differences_draws_the_pipelines_own_images(tmp_path):
    """As diffusers' pipeline steps, without further arguments: no warning, no difference."""
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=200, clip_sample=False, **CHAINS["linear"]
    )
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    scheduler.set_timesteps(50)
    theirs = walk(in_double(scheduler), unet, NOISE)
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours(model, NOISE) - theirs).abs().max()) < 1e-5 * scale


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
def test_a_chain_may_end_in_pure_noise(tmp_path, kind):
    """λ = −80 stands for −∞: the first step from there is theirs to the last digit of float32."""
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=200, clip_sample=False, rescale_betas_zero_snr=True,
        timestep_spacing="trailing", prediction_type=kind, **CHAINS["linear"],
    )  # fmt: skip
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    scheduler.set_timesteps(50)
    levels = model.sampler.levels()
    assert float(levels[0]) == -80
    assert int(scheduler.timesteps[0]) == 199
    assert torch.equal(model.network.timestep(levels[:1]), torch.tensor([199.0]))
    alpha, sigma = ld.alpha_sigma(levels[:1])
    assert float(alpha) < 1e-17
    assert float(sigma) == 1
    theirs = walk(in_double(scheduler), unet, NOISE)
    scale = max(1.0, float(theirs.abs().max()))
    assert float((ours(model, NOISE) - theirs).abs().max()) < 1e-5 * scale


def test_pure_noise_says_nothing_of_eps(tmp_path):
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=200, clip_sample=False, rescale_betas_zero_snr=True
    )
    pipeline(tmp_path, scheduler)
    with pytest.raises(ValueError, match=r"ends in pure noise.*got epsilon"):
        ld.from_diffusers(tmp_path)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"clip_sample": True}, "clip_sample=True"),
        ({"set_alpha_to_one": False}, "set_alpha_to_one=False"),
    ],
)
def test_a_setting_that_is_not_followed_is_named_and_matters(tmp_path, setting, named):
    settings = {"clip_sample": False, **setting}
    scheduler = diffusers.DDIMScheduler(num_train_timesteps=200, **settings, **CHAINS["linear"])
    unet = pipeline(tmp_path, scheduler)
    with pytest.warns(UserWarning, match=named) as caught:
        model = ld.from_diffusers(tmp_path)
    assert len(caught) == 1
    scheduler.set_timesteps(50)
    assert not torch.allclose(ours(model, NOISE), walk(scheduler, unet, NOISE), rtol=0, atol=1e-3)


def test_another_sampler_of_the_same_chain_becomes_ddim(tmp_path):
    unet = pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=100, **CHAINS["linear"]))
    solver = diffusers.DPMSolverMultistepScheduler(num_train_timesteps=100, **CHAINS["linear"])
    solver.save_pretrained(tmp_path / "scheduler")
    model = ld.from_diffusers(tmp_path)
    assert isinstance(model.sampler, ld.DDIMSampler)
    assert model.sampler.steps == 50
    assert repr(model.schedule) == repr(ld.BetaSchedule(1e-4, 0.2, 100))
    assert torch.equal(model.network.network(NOISE, 3).sample, unet(NOISE, 3).sample)


def test_its_loss_is_ddpms_own(tmp_path):
    """The squared error of ε at a level is what diffusers' training takes, by `add_noise`."""
    scheduler = in_double(diffusers.DDPMScheduler(num_train_timesteps=100, **CHAINS["linear"]))
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    x = torch.rand(5, *SHAPE) * 2 - 1
    eps, t = torch.randn(5, *SHAPE), torch.tensor([1, 20, 50, 80, 99])
    with torch.no_grad():
        terms = model.loss(model.denoiser, x, t=(t - 0.5) / 99, eps=eps)
        theirs = unet(scheduler.add_noise(x, eps, t).float(), t).sample
    expected = F.mse_loss(theirs, eps, reduction="none").flatten(1).mean(1)
    assert torch.allclose(terms.eps_mse, expected, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:logsnr_max:UserWarning")
def test_its_bound_is_that_of_its_chain(tmp_path):
    """Prior, 99 KL divergences between Gaussians, and the decoder, summed as DDPM's paper does."""
    scheduler = in_double(diffusers.DDPMScheduler(num_train_timesteps=100, **CHAINS["linear"]))
    unet = pipeline(tmp_path, scheduler)
    model = ld.from_diffusers(tmp_path)
    x = ld.level_values(256).float()[torch.randint(256, (1, *SHAPE))]
    eps = torch.randn(1, *SHAPE)
    kept, betas = scheduler.alphas_cumprod, scheduler.betas.double()
    divergence = 0.0
    for t in range(1, 100):
        a, b, beta = kept[t], kept[t - 1], betas[t]
        z = a.sqrt() * x + (1 - a).sqrt() * eps
        with torch.no_grad():
            found = unet(z.float(), t).sample
        variance = (1 - b) / (1 - a) * beta
        mean_scale = b.sqrt() * beta / (1 - a)  # of x in the posterior's mean
        guess = (z - (1 - a).sqrt() * found) / a.sqrt()
        divergence += float((mean_scale * (guess - x)).square().mean() / (2 * variance))
    with torch.no_grad():
        t = (torch.arange(99) + 0.5) / 99
        terms = [
            ld.weighted_error(
                model.denoiser,
                x,
                model.schedule,
                model.weighting,
                model.num_timesteps,
                one[None],
                eps,
            ).loss
            for one in t
        ]
        bound = ld.variational_bound(
            model.denoiser,
            x,
            model.schedule,
            ld.DiscretizedGaussianDecoder(256),
            num_timesteps=model.num_timesteps,
        )
    assert float(torch.stack(terms).mean()) == pytest.approx(divergence, rel=1e-3)
    assert bool(bound.total.isfinite().all())
    last = kept[99]
    prior = 0.5 * (last * x.square().mean() + (1 - last) - 1 - torch.log(1 - last))
    assert float(bound.prior) == pytest.approx(float(prior), rel=1e-3)


def test_an_old_pipeline_has_its_files_at_the_top(tmp_path):
    unet = pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=100))
    for path in [*(tmp_path / "unet").iterdir(), *(tmp_path / "scheduler").iterdir()]:
        path.rename(tmp_path / path.name)
    (tmp_path / "unet").rmdir()
    (tmp_path / "scheduler").rmdir()
    model = ld.from_diffusers(tmp_path)
    assert torch.equal(model.network.network(NOISE, 3).sample, unet(NOISE, 3).sample)


def test_it_can_be_described_and_drawn_from(tmp_path):
    pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=20, **CHAINS["sigmoid"]))
    model = ld.from_diffusers(tmp_path)
    again = build(json.loads(json.dumps(describe(model)))).eval()
    again.load_state_dict(model.state_dict())
    drawn = [m.sample(2, torch.Generator().manual_seed(0)) for m in (model, again)]
    assert torch.equal(*drawn)
    assert drawn[0].shape == (2, *SHAPE)


def changed(folder, part, **values):
    names = {"unet": "config.json", "scheduler": "scheduler_config.json"}
    path = folder / part / names[part]
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("part", "values", "expected"),
    [
        (
            "unet",
            {"_class_name": "UNet2DConditionModel"},
            "unconditional UNet2DModel, got UNet2DC",
        ),
        ("unet", {"num_class_embeds": 10}, "num_class_embeds=10"),
        ("unet", {"sample_size": None}, "sample_size, got none"),
        ("scheduler", {"_class_name": "FlowMatchEulerDiscreteScheduler"}, "chain of betas"),
        ("scheduler", {"_class_name": "UNet2DModel"}, "chain of betas"),
        ("scheduler", {"_class_name": None}, "chain of betas"),
        ("scheduler", {"prediction_type": "flow"}, "prediction_type of epsilon"),
        ("scheduler", {"variance_type": "learned_range"}, "variance_type of fixed_small"),
        ("scheduler", {"clip_sample_range": 3.0}, "clip_sample_range=3.0"),
        ("scheduler", {"thresholding": True}, "thresholding=True"),
        ("scheduler", {"rescale_betas_zero_snr": True}, "ends in pure noise"),
    ],
)
def test_a_pipeline_of_another_kind_is_refused(tmp_path, part, values, expected):
    pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=10))
    changed(tmp_path, part, **values)
    with pytest.raises(ValueError, match=expected):
        ld.from_diffusers(tmp_path)


def test_what_is_no_pipeline_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"with unet/config\.json.*hf download NAME"):
        ld.from_diffusers(tmp_path / "google" / "ddpm-cifar10-32")
    pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=10))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("[1]")
    with pytest.raises(ValueError, match="expected a config of diffusers, got a list"):
        ld.from_diffusers(tmp_path)


def test_the_arguments_make_a_model_to_train(tmp_path):
    """What the page on diffusers says: a training begins from published weights."""
    from lit_diffusion.training import LitDiffusion

    pipeline(tmp_path, diffusers.DDPMScheduler(num_train_timesteps=20, **CHAINS["cosine"]))
    model = ld.from_diffusers(tmp_path)
    lit = LitDiffusion(**arguments(model))
    drawn = [m.eval().sample(2, torch.Generator().manual_seed(0)) for m in (model, lit)]
    assert torch.equal(*drawn)
