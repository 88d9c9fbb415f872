"""The other networks: waves before any network, and the perceptron. B, C, H and W all differ."""

import inspect

import pytest
import torch
from torch import nn

from lit_diffusion.nn import FourierFeatures, ResidualMLP, UNet
from lit_diffusion.nn.embeddings import FourierWaves
from lit_diffusion.testing import check_network

B, C, H, W = 5, 3, 4, 2
SHAPE, SEEN = (C, H, W), (C * 5, H, W)


def wrapped(num_classes=None):
    inner = ResidualMLP(SEEN, features=16, layers=1, num_classes=num_classes)
    return FourierFeatures(inner, exponents=(1, 6), shape=SHAPE)


def around_unet(num_classes=None):
    inner = UNet(SEEN, channels=(8,), attention=(), num_classes=num_classes)
    return FourierFeatures(inner, exponents=(1, 6), shape=SHAPE)


def perceptron(num_classes=None):
    return ResidualMLP(SHAPE, features=16, layers=3, num_classes=num_classes)


def awake(net):
    """Move all parameters, for what starts at zero would hide the rest."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def inputs(net, dtype=torch.float32):
    torch.manual_seed(2)
    given = [torch.randn(B, *SHAPE, dtype=dtype), torch.linspace(-20, 20, B, dtype=dtype)]
    return given if net.num_classes is None else [*given, torch.tensor([0, 3, -1, 1, 2])]


@pytest.fixture(params=[wrapped, around_unet, perceptron], ids=lambda make: make.__name__)
def make(request):
    torch.manual_seed(0)
    return request.param


@pytest.fixture(params=[None, 4], ids=["plain", "classes"])
def net(make, request):
    return awake(make(request.param))


@pytest.mark.parametrize("cls", [FourierFeatures, ResidualMLP])
def test_constructs_without_arguments(cls):
    net = cls()
    out = net(torch.randn(2, 1, 8, 8), torch.zeros(2))
    assert torch.equal(out, torch.zeros(2, 1, 8, 8))


def test_the_laws_of_a_network(net):
    check_network(net)
    for name in inspect.signature(type(net)).parameters:
        value = getattr(net, name)
        assert isinstance(value, nn.Module) or f"{name}={value!r}" in net.extra_repr()


def test_a_new_network_says_nothing(make):
    net = make()
    assert torch.equal(net(*inputs(net)), torch.zeros(B, *SHAPE))


def test_labels_are_passed_on_or_refused(make):
    assert make(4).num_classes == 4
    assert make().num_classes is None
    with pytest.raises(ValueError, match="without classes"):
        make()(*inputs(make()), torch.zeros(B, dtype=torch.long))


def test_lists_become_tuples():
    net = FourierFeatures(ResidualMLP([6, 2, 2]), exponents=[4], shape=[2, 2, 2])
    assert (net.exponents, net.shape, net.network.shape) == (
        (4,),
        (2, 2, 2),
        (6, 2, 2),
    )


# Waves ---------------------------------------------------------------------------------------


class Seen(nn.Module):
    """A network, without an shape, that returns what it was shown."""

    def forward(self, z, logsnr, label=None):
        self.z, self.label = z, label
        return z


def test_the_inner_network_sees_the_waves_and_its_first_channels_come_out():
    inner = Seen()
    z, label = torch.rand(B, *SHAPE) - 0.5, torch.arange(B)
    out = FourierFeatures(inner, (0, 7), SHAPE)(z, torch.zeros(B), label)
    assert torch.equal(out, z)
    assert inner.label is label
    phases = [z.double() * torch.pi, z.double() * 128 * torch.pi]
    waves = [z.double(), *(p.sin() for p in phases), *(p.cos() for p in phases)]
    torch.testing.assert_close(inner.z.double(), torch.cat(waves, 1), rtol=0, atol=1e-4)


def test_no_exponents_is_the_network_alone():
    inner = awake(ResidualMLP(SHAPE, features=8))
    z, logsnr = inputs(inner)
    assert torch.equal(FourierFeatures(inner, (), SHAPE)(z, logsnr), inner(z, logsnr))


def test_waves_are_float32_whatever_surrounds_them():
    waves, z = FourierWaves((7,)), torch.linspace(-1, 1, 101).view(1, 1, 1, 101)
    exact = waves(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert waves(z).dtype == torch.float32
        assert torch.equal(waves(z), exact)
    # A bfloat16 number is a number: its waves are those of that number, rounded at the end only.
    short = z.bfloat16()
    assert waves(short).dtype == torch.bfloat16
    assert torch.equal(waves(short), waves(short.float()).bfloat16())


@pytest.mark.parametrize(
    ("build_it", "message"),
    [
        (
            lambda: FourierFeatures(ResidualMLP((2, 1, 1)), (6, 7), (2, 1, 1)),
            r"\(10, 1, 1\), 10 channels",
        ),
        (lambda: FourierFeatures(UNet((5, 8, 9)), (6, 7)), r"shape=\(5, 8, 8\)"),
        (lambda: FourierFeatures(exponents=(-1,)), "at least 0"),
        (lambda: FourierFeatures(shape=(8,)), "positive integers"),
        (lambda: ResidualMLP(shape=(8, 0)), "positive integers"),
        (lambda: ResidualMLP(features=0), "at least 1"),
        (lambda: ResidualMLP(layers=0), "at least 1"),
        (lambda: ResidualMLP(num_classes=0), "num_classes"),
        (lambda: ResidualMLP((2, 1, 1))(torch.zeros(3, 1, 2, 1), torch.zeros(3)), r"\(1, 2, 1\)"),
    ],
)
def test_mistakes_are_refused(build_it, message):
    with pytest.raises(ValueError, match=message):
        build_it()
