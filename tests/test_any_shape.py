"""Networks for series, images, volumes and sets: the same laws for one, two and three axes."""

import pytest
import torch
from torch.nn import functional as F

from lit_diffusion.nn import DiT, FourierFeatures, ResidualMLP, UNet, check_shape, takes_shape
from lit_diffusion.nn.blocks import Upsample
from lit_diffusion.nn.patches import patchify, unpatchify
from lit_diffusion.testing import check_network

SHAPES = {"series": (2, 24), "images": (3, 8, 12), "volumes": (1, 8, 4, 8)}
SMALL = {"depth": 2, "width": 48, "heads": 2, "num_classes": 4}
NETWORKS = {
    "unet": lambda shape: UNet(shape, (8, 16), attention=(shape[1] // 2,), num_classes=4),
    "unet at one resolution": lambda shape: UNet(
        shape, (8, 8), attention=(shape[1],), num_classes=4, downsample=False
    ),
    "dit": lambda shape: DiT(shape, patch=2, **SMALL),
    "dit with rope": lambda shape: DiT(shape, patch=4, rope=True, qk_norm=True, **SMALL),
    "set": lambda shape: DiT(shape, patch=1, positions="none", **SMALL),
    "mlp": lambda shape: ResidualMLP(shape, features=32, num_classes=4),
    "waves": lambda shape: FourierFeatures(
        UNet((shape[0] * 5, *shape[1:]), (8, 16), attention=(), num_classes=4), (3, 4), shape
    ),
}
B = 3


def awake(net):
    """Move all parameters, since what starts at zero would hide the rest."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net.eval()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_the_laws_of_a_network(make, shape):
    torch.manual_seed(0)
    net = make(shape)
    assert tuple(net.shape) == shape
    z, logsnr, label = torch.randn(B, *shape), torch.randn(B), torch.tensor([0, 3, -1])
    assert net(z, logsnr, label).abs().max() == 0  # a new network
    check_network(net)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["unet", "dit"])
def test_other_sizes_pass(kind, shape):
    net = awake(NETWORKS[kind](shape))
    z = torch.randn(B, shape[0], *(side + 4 for side in shape[1:]))
    assert net(z, torch.zeros(B)).shape == z.shape


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_a_network_says_which_shapes_it_takes(make, shape):
    net = make(shape)
    channels, *sides = shape
    assert takes_shape(net, shape)
    assert not takes_shape(net, (channels + 1, *sides))
    assert not takes_shape(net, (channels, *sides, 4))
    any_size = not isinstance(net, ResidualMLP) and getattr(net, "positions", "none") == "none"
    assert takes_shape(net, (channels, *(side + 4 for side in sides))) == any_size


def test_what_a_network_does_not_take_is_said_in_its_own_words():
    small = UNet((1, 8, 8), (8, 8, 8), attention=())
    flat = UNet((1, 8, 8), (8, 8, 8), attention=(), downsample=False)
    resampled = DiT((1, 8, 8), patch=2, positions="resampled", **SMALL)
    plain = torch.nn.Identity()
    assert takes_shape(small, (1, 4, 5))
    assert takes_shape(flat, (1, 1, 3))
    assert takes_shape(resampled, (1, 2, 14))
    for net, shape, sentence in [
        (small, (1, 3, 8), "3x8 pixels are too few"),
        (small, (1, 0, 8), "1 channels and any 2 sides"),
        (resampled, (1, 8, 9), "multiples of 2"),
        (resampled, (1, 0, 8), "multiples of 2"),
        (DiT((1, 8, 8), **SMALL), (1, 8, 16), "train with positions='resampled'"),
        (plain, (1, 8, 8), "only those it is trained on, got .* method check_shape"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            check_shape(net, shape)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("size", [4, 5])
def test_enlarging_is_repeating_and_a_convolution(dims, size):
    torch.manual_seed(0)
    enlarge = Upsample(4, dims).double()
    h = torch.randn(B, 4, *[size] * dims, dtype=torch.float64)
    repeated = h
    for axis in range(2, 2 + dims):
        repeated = repeated.repeat_interleave(2, axis)
    torch.testing.assert_close(enlarge(h, [2 * size] * dims), enlarge.conv(repeated))
    odd = enlarge(h, [2 * size - 1] * dims)
    assert odd.shape[2:] == (2 * size - 1,) * dims


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_contain_neighbours_and_can_be_put_together(dims):
    sides = (6, 9, 12)[:dims]
    z = torch.randn(B, 2, *sides)
    tokens = patchify(z, 3)
    grid = [side // 3 for side in sides]
    assert tokens.shape == (B, torch.tensor(grid).prod(), 2 * 3**dims)
    last = z[(slice(None), slice(None), *[slice(-3, None)] * dims)]
    assert torch.equal(tokens[:, -1], last.flatten(1))
    assert torch.equal(unpatchify(tokens, 3, sides), z)
    if dims == 2:
        assert torch.equal(tokens, F.pixel_unshuffle(z, 3).flatten(2).transpose(1, 2))


def test_points_of_a_set_have_no_order():
    net = awake(DiT((3, 10), patch=1, positions="none", **SMALL))
    z, logsnr = torch.randn(B, 3, 10), torch.randn(B)
    order = torch.randperm(10)
    torch.testing.assert_close(net(z[:, :, order], logsnr), net(z, logsnr)[:, :, order])
    ordered = awake(DiT((3, 10), patch=1, **SMALL))
    assert not torch.allclose(ordered(z[:, :, order], logsnr), ordered(z, logsnr)[:, :, order])


def test_resampled_positions_cover_the_same_extent():
    index, resampled = (
        DiT((1, 8, 16), patch=2, positions=kind, **SMALL) for kind in ("index", "resampled")
    )
    here = torch.device("cpu")
    for one, two in zip(
        index._places((8, 16), here), resampled._places((8, 16), here), strict=True
    ):
        assert torch.equal(one, two)  # at the size they were built for
    rows, columns = resampled._places((16, 8), here)
    assert rows.tolist() == [-0.25 + i / 2 for i in range(8)]  # 8 tokens on the extent of 4
    assert columns.tolist() == [0.5, 2.5, 4.5, 6.5]
    assert index._places((16, 8), here)[0].tolist() == list(range(8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UNet((1, 2, 3, 4, 5)), r"\(C, L\) for series"),
        (lambda: UNet((4,)), r"got \(4,\)"),
        (lambda: UNet((1, 3), (8, 8, 8)), "3 pixels are too few"),
        (lambda: UNet((1, 8), channels_last=True), "got a series"),
        (lambda: DiT((1, 7), patch=2), r"\(C, L\) = \(1, 7\)"),
        (lambda: DiT((1, 8), positions="none", rope=True), "there is no rope"),
        (lambda: DiT((1, 8), positions="nowhere"), "'nowhere'"),
        (lambda: ResidualMLP(()), "positive integers"),
        (lambda: FourierFeatures(shape=(4,)), r"got \(4,\)"),
    ],
)
def test_mistakes_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_volumes_have_channels_last_too():
    torch.manual_seed(0)
    plain = awake(UNet((2, 4, 4, 4), (8, 8), attention=()))
    last = UNet((2, 4, 4, 4), (8, 8), attention=(), channels_last=True).eval()
    last.load_state_dict(plain.state_dict())
    z, logsnr = torch.randn(B, 2, 4, 4, 4), torch.randn(B)
    torch.testing.assert_close(last(z, logsnr), plain(z, logsnr), rtol=1e-4, atol=1e-5)
