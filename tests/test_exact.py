"""Noise levels, weights and losses keep their precision, whatever the type of the network."""

import contextlib

import pytest
import torch
from torch import nn

import lit_diffusion as ld
from lit_diffusion.exact import ExactModule
from lit_diffusion.grey_levels import level_values

HALVES = [torch.bfloat16, torch.float16]
PARTS = [
    pytest.param(family, cls, id=cls.__name__)
    for family, registry in (
        ("schedule", ld.SCHEDULES),
        ("weighting", ld.WEIGHTINGS),
        ("prediction", ld.PREDICTIONS),
        ("decoder", ld.DECODERS),
    )
    for cls in registry.classes()
    if cls.__module__.startswith("lit_diffusion.")
]


@contextlib.contextmanager
def default_dtype(dtype):
    """What a trainer of precision bf16-true does around each step."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def small(shape=(1, 8, 8), **arguments):
    torch.manual_seed(0)
    return ld.UNet(shape, channels=(8,), attention=(), **arguments)


def numbers(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("family", "cls"), PARTS)
def test_the_loss_of_a_narrow_network_has_exact_terms(family, cls, dtype):
    part = cls()
    given = {family: part} if family in ("schedule", "weighting", "decoder") else {}
    steps = getattr(part, "num_timesteps", None) if family == "weighting" else None
    loss = ld.DiffusionLoss(num_timesteps=steps, **given)
    prediction = part if family == "prediction" else None
    denoiser = ld.Denoiser(small(), prediction)  # its output is 0 whatever its weights
    model = nn.ModuleDict({"loss": loss, "denoiser": denoiser})
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (8, 1, 8, 8), generator=generator) / 127.5 - 1
    t, eps = ld.fixed_times(torch.arange(8), 8), torch.randn(x.shape, generator=generator)
    rest = torch.Generator().manual_seed(1)
    before, expected = numbers(loss), loss(denoiser, x, t=t, eps=eps, generator=rest)
    model.to(dtype)
    with default_dtype(dtype):
        fresh = cls()
        again = ld.fixed_times(torch.arange(8), 8)
        found = loss(denoiser, x, t=again, eps=eps, generator=rest.manual_seed(1))
    assert next(denoiser.parameters()).dtype == dtype
    for name, value in numbers(loss).items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    for one, other in zip(found[:3], expected[:3], strict=True):  # the numbers of each example
        assert one.dtype == other.dtype
        assert one.dtype in (torch.float32, torch.float64)
        assert torch.equal(one, other)
    if isinstance(fresh, nn.Module):  # one that is made under such a trainer is the same, too
        assert all(
            torch.equal(value, before[f"{family}.{n}"]) for n, value in numbers(fresh).items()
        )


@pytest.mark.parametrize("dtype", HALVES)
def test_data_in_half_precision_have_the_loss_of_the_same_numbers(dtype):
    x = torch.randn(4, 1, 8, 8).to(dtype)
    loss, denoiser = ld.DiffusionLoss(), ld.Denoiser(small())
    found = [
        loss(denoiser, data, generator=torch.Generator().manual_seed(0)) for data in (x, x.float())
    ]
    assert all(torch.equal(*pair) for pair in zip(*(each[:3] for each in found), strict=True))


class Seen(nn.Module):
    """A network that looks at λ as a user's would, and keeps what it was given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 64)

    def forward(self, z, logsnr, **cond):
        self.given = z, logsnr
        return z + self.layer(logsnr[:, None]).view_as(z)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64])
def test_a_network_gets_noisy_data_and_noise_level_in_float32_at_least(dtype):
    network = Seen().to(dtype)
    least = torch.promote_types(dtype, torch.float32)
    denoised = ld.Denoiser(network)(torch.ones(2, 1, 8, 8, dtype=dtype), torch.zeros(2).double())
    assert {value.dtype for value in network.given} == {least}
    assert {value.dtype for value in denoised} == {least}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("network", [
    lambda: small(num_classes=10, conditions={"angle": 2}, fourier=(3, 4)),
    lambda: ld.DiT((1, 8, 8), patch=2, width=16, depth=2, heads=2, num_classes=10, qk_norm=True),
    lambda: ld.ResidualMLP((1, 8, 8), features=16, layers=2, num_classes=10),
    lambda: ld.FourierFeatures(exponents=(6, 7), shape=(1, 8, 8)),
], ids=["UNet", "DiT", "ResidualMLP", "FourierFeatures"])  # fmt: skip
def test_our_networks_are_nearly_themselves_in_half_precision(network, dtype):
    torch.manual_seed(0)
    network = network()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
        p.data = p.data.to(dtype).float()  # the same weights in both
    cond = {"label": torch.tensor([1, -1])} if network.num_classes else {}
    if getattr(network, "conditions", None):
        cond["angle"] = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    denoiser = ld.Denoiser(network)
    z, logsnr = torch.randn(2, 1, 8, 8), torch.tensor([-3.0, 6.0])
    expected = denoiser(z, logsnr, **cond).eps
    denoiser.to(dtype)
    found = denoiser(z, logsnr, **cond).eps
    assert float(((found - expected).norm() / expected.norm()).detach()) < 0.05
    found.square().mean().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in network.parameters())


def test_an_exact_module_moves_and_keeps_its_numbers():
    class Levels(ExactModule):
        def __init__(self):
            super().__init__()
            self.register_buffer("levels", torch.full((3,), 1 / 3))
            self.weight = nn.Parameter(torch.full((3,), 1 / 3))

    whole = nn.Sequential(Levels(), nn.Linear(1, 1))
    for dtype in (torch.bfloat16, torch.float64, torch.float16):
        whole.to(dtype)
        assert whole[1].weight.dtype == dtype
        assert torch.equal(whole[0].levels, torch.full((3,), 1 / 3))
        assert torch.equal(whole[0].weight.data, torch.full((3,), 1 / 3))
    assert whole.to("meta")[0].levels.device.type == "meta"


def test_grey_levels_do_not_depend_on_the_default_type():
    expected = {n: level_values(n) for n in range(2, 257)}
    with default_dtype(torch.bfloat16):
        assert all(torch.equal(level_values(n), values) for n, values in expected.items())
