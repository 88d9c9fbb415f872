"""The laws of a network, with B, C, H and W all different."""

import hashlib
import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lit_diffusion.nn import UNet
from lit_diffusion.nn.embeddings import FourierWaves, LabelEmbedding, LogSNREmbedding
from lit_diffusion.nn.unet import Upsample
from lit_diffusion.testing import check_network

B, C, H, W = 5, 3, 12, 10
ARGUMENTS = tuple(inspect.signature(UNet).parameters)
SMALL = {"shape": (C, H, W), "channels": (8, 16), "attention": (6,), "head_channels": 8}
KINDS = {
    "plain": {},
    "classes": {"num_classes": 4},
    "vdm": {"downsample": False, "attention": (H,), "fourier": (3, 4), "num_classes": 4},
    "three levels": {"channels": (8, 12, 16), "blocks": 2, "num_classes": 4, "attention": (3, 6)},
}


def awake(net: nn.Module) -> nn.Module:
    """Move all parameters, for what starts at zero would hide the rest."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


def inputs(net: UNet, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    torch.manual_seed(2)
    given = [torch.randn(B, C, H, W, dtype=dtype), torch.linspace(-20, 20, B, dtype=dtype)]
    return given if net.num_classes is None else [*given, torch.tensor([0, 3, -1, 1, 2])]


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def net(request):
    torch.manual_seed(0)
    return awake(UNet(**SMALL | request.param))


def test_the_laws_of_a_network(net):
    check_network(net)
    assert all(f"{name}={getattr(net, name)!r}" in net.extra_repr() for name in ARGUMENTS)


def test_constructs_without_arguments():
    net = UNet()
    assert net(torch.randn(2, 1, 8, 8), torch.zeros(2)).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_network_says_nothing(kind):
    net = UNet(**SMALL | KINDS[kind])
    assert torch.equal(net(*inputs(net)), torch.zeros(B, C, H, W))


@pytest.mark.parametrize("size", [(H, W), (8, 8), (9, 13), (17, 11), (8, 31)])
def test_any_size(net, size):
    out = net(torch.randn(B, C, *size), *inputs(net)[1:])
    assert out.shape == (B, C, *size)
    assert out.isfinite().all()


def test_shape_may_be_odd():
    net = awake(UNet(shape=(2, 9, 13), channels=(8, 16, 24), attention=(5, 3)))
    assert sum(type(m).__name__ == "Attention" for m in net.modules()) == 2 * (1 + 2) + 1
    assert net(torch.randn(4, 2, 9, 13), torch.zeros(4)).shape == (4, 2, 9, 13)


def test_gradient_reaches_the_noise_level(net):
    z, logsnr, *label = inputs(net)
    net(z, logsnr.requires_grad_(), *label).square().mean().backward()
    assert (logsnr.grad != 0).all()


def test_channels_last_is_the_same(net):
    z, *rest = inputs(net)
    plain = net(z, *rest)
    last = net.to(memory_format=torch.channels_last)
    out = last(z.to(memory_format=torch.channels_last), *rest)
    torch.testing.assert_close(out, plain, rtol=1e-3, atol=1e-3)


def test_float64_noise_levels_for_a_float32_network(net):
    z, logsnr, *label = inputs(net)
    out = net(z, logsnr.double(), *label)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, net(z, logsnr, *label))


def test_bfloat16_autocast(net):
    single = net(*inputs(net))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net.train()(*inputs(net))
    out.mean().backward()
    assert out.dtype == torch.float32
    assert (out - single).square().mean().sqrt() < 0.1 * single.std()


def test_the_embedding_ignores_autocast():
    embed, logsnr = LogSNREmbedding(8), torch.linspace(-20, 20, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = embed(logsnr)
    assert torch.equal(out, embed(logsnr))


def test_lists_become_tuples():
    net = UNet(shape=[1, 8, 8], channels=[8, 16], attention=[4], fourier=[4])
    assert (net.shape, net.channels) == ((1, 8, 8), (8, 16))
    assert (net.attention, net.fourier) == ((4,), (4,))


def test_same_seed_same_network():
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        net = UNet(**SMALL, num_classes=4, dropout=0.5)
        states.append((net.state_dict(), awake(net).train()(*inputs(net))))
    assert torch.equal(states[0][1], states[1][1])
    assert all(torch.equal(states[0][0][k], states[1][0][k]) for k in states[0][0])


def test_dropout_only_in_training():
    net = awake(UNet(**SMALL, dropout=0.5))
    given = inputs(net)
    assert torch.equal(net(*given), net(*given))
    assert not torch.equal(net.train()(*given), net(*given))


def test_without_downsampling_nothing_is_halved():
    net = UNet(**SMALL | KINDS["vdm"])
    assert all(m.stride == (1, 1) for m in net.modules() if isinstance(m, nn.Conv2d))
    assert sum(type(m).__name__ == "Attention" for m in net.modules()) == 1
    assert not any(type(m).__name__ == "Attention" for m in net.down.modules())


def test_waves_show_the_distance_to_the_grey_level():
    level = torch.arange(17) / 8 - 1
    wave = FourierWaves((4,))((level + 0.01).view(1, 1, 1, 17))
    torch.testing.assert_close(wave[0, 1, 0], torch.full((17,), 0.16 * torch.pi).sin())


def test_a_label_without_classes_is_refused():
    with pytest.raises(ValueError, match="without classes"):
        UNet()(torch.zeros(1, 1, 8, 8), torch.zeros(1), torch.zeros(1, dtype=torch.long))


@pytest.mark.parametrize("label", [-2, 4])
def test_labels_out_of_range_are_refused(label):
    with pytest.raises(IndexError):
        LabelEmbedding(4, 8)(torch.tensor([0, label]), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (8,)}, "shape"),
        ({"channels": ()}, "channels"),
        ({"channels": (8, 8, 8, 8, 8)}, "too few"),
        ({"blocks": 0}, "blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_classes": 0}, "num_classes"),
        ({"head_channels": 0}, "head_channels"),
        ({"head_channels": 3, "channels": (8, 10)}, "attention heads"),
        ({"embedding_features": 0}, "embedding_features"),
        ({"fourier": (-1,)}, "fourier"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        UNet(**arguments)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_compiles_into_one_graph(net):
    compiled = torch.compile(net, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs(net)), net(*inputs(net)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("size", [(6, 10), (5, 9), (6, 9), (12, 10)])
def test_enlarging_is_repeating_pixels_and_a_convolution(size):
    """To the last bits in float64, values and gradients, whichever way it is computed."""
    torch.manual_seed(0)
    enlarge = Upsample(4).double()
    h = torch.randn(2, 4, 3, 5, dtype=torch.float64, requires_grad=True)
    over = torch.randn(2, 4, *size, dtype=torch.float64)
    expected = enlarge.conv(F.interpolate(h, size=size, mode="nearest"))
    found = enlarge(h, size)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)
    inputs = [h, *enlarge.parameters()]
    for a, b in zip(
        torch.autograd.grad((found * over).sum(), inputs),
        torch.autograd.grad((expected * over).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("arguments", "names", "total"),
    [
        ({}, "6ac03648059ad039", 17466.002),
        (
            {
                "shape": (3, 16, 24),
                "channels": (16, 32),
                "attention": (8,),
                "num_classes": 10,
            },
            "d4b9da4e99c75999",
            6544.914,
        ),
        (
            {
                "shape": (3, 9, 9),
                "channels": (8, 16, 16),
                "blocks": 2,
                "attention": (9, 5, 3),
                "conditions": {"a": 3},
            },
            "e2bc352b3e5e064d",
            5861.299,
        ),
        (
            {
                "shape": (1, 8, 8),
                "downsample": False,
                "attention": (8,),
                "fourier": (3, 4),
                "dropout": 0.1,
                "channels_last": True,
                "embedding_features": 24,
            },
            "fc97db03a8ffb928",
            8555.587,
        ),
    ],
)
def test_names_and_first_weights_do_not_change(arguments, names, total):
    """Checkpoints depend on the names, and a seed on the order of construction."""
    torch.manual_seed(0)
    state = UNet(**arguments).state_dict()
    found = repr([(name, list(value.shape)) for name, value in state.items()])
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == names
    assert sum(float(value.double().abs().sum()) for value in state.values()) == pytest.approx(
        total, rel=1e-6
    )
