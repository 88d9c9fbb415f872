"""Pictures of samples that are no images: what is plotted is where and what the numbers say."""

import pytest
import torch
from PIL import Image

from lit_diffusion.training.callbacks.sample_grid import save_grid
from lit_diffusion.training.run.figures import PALETTE
from lit_diffusion.training.run.pictures import FOOT, GAP, HIGH, SQUARE, WIDE, picture_of


def places(picture, colour, within=90):
    """Rows and columns of the pixels of a colour."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    near = (picture.long() - rgb[:, None, None]).abs().sum(0) < within
    return near.nonzero().T


def panel(picture, row, column, width, height):
    top, left = GAP + row * (height + GAP), GAP + column * (width + GAP)
    return picture[:, top : top + height, left : left + width]


def test_a_channel_is_a_line_of_its_colour_and_height():
    low, high = torch.full((1, 50), -1.0), torch.full((1, 50), 3.0)
    signals = torch.stack([torch.cat([high, low]), torch.cat([low, low + 2])])
    picture = picture_of(signals, columns=2, kind="signal")
    assert picture.shape == (3, HIGH + 2 * GAP + FOOT, 2 * (WIDE + GAP) + GAP)
    left, right = (panel(picture, 0, column, WIDE, HIGH) for column in (0, 1))
    heights = [places(left, PALETTE[c])[0].float().mean() for c in (0, 1)]
    heights += [places(right, PALETTE[1])[0].float().mean()]
    # 3 is at the top of each panel, −1 at the bottom and 1 between them.
    torch.testing.assert_close(
        torch.stack(heights), torch.tensor([4.0, HIGH - 4, HIGH / 2]), atol=1.5, rtol=0
    )


def test_a_gap_of_a_signal_is_blank_and_a_peak_of_a_long_one_is_seen():
    signal = torch.zeros(1, 1, 100)
    signal[..., 40:60] = torch.nan
    columns = places(panel(picture_of(signal, 1, "signal"), 0, 0, WIDE, HIGH), PALETTE[0])[1]
    assert set(range(10, 40)) <= set(columns.tolist())
    assert not set(range(48, 64)) & set(columns.tolist())
    long = torch.zeros(1, 1, 100_000)
    long[..., 50_001] = 1.0  # one of nearly 900 numbers in a column of pixels
    rows, columns = places(panel(picture_of(long, 1, "signal"), 0, 0, WIDE, HIGH), PALETTE[0])
    assert columns[rows < 12].tolist()
    assert (columns[rows < 12] - WIDE / 2).abs().max() <= 2


def test_points_are_at_their_places():
    corner = torch.tensor([[0.0, 10.0], [0.0, 5.0]])
    picture = picture_of(torch.stack([corner, corner.mean(1, True).expand(2, 2)]), 2, "points")
    assert picture.shape == (3, SQUARE + 2 * GAP + FOOT, 2 * (SQUARE + GAP) + GAP)
    rows, columns = places(panel(picture, 0, 0, SQUARE, SQUARE), PALETTE[0])
    first, last = columns < SQUARE / 2, columns > SQUARE / 2
    mean = lambda values: float(values.float().mean())  # noqa: E731
    # Both axes have one scale: the wider one fills 0.9 of the panel, the other half of that.
    assert mean(columns[first]) == pytest.approx(0.05 * SQUARE, abs=1.5)
    assert mean(columns[last]) == pytest.approx(0.95 * SQUARE, abs=1.5)
    assert mean(rows[first]) == pytest.approx((0.5 + 0.225) * SQUARE, abs=1.5)
    assert mean(rows[last]) == pytest.approx((0.5 - 0.225) * SQUARE, abs=1.5)
    rows, columns = places(panel(picture, 0, 1, SQUARE, SQUARE), PALETTE[0])
    assert (mean(rows), mean(columns)) == pytest.approx((SQUARE / 2, SQUARE / 2), abs=1.5)


def test_a_volume_is_its_three_middle_slices():
    volume = torch.zeros(2, 1, 64, 64, 64)
    volume[0, 0, 32] = 1  # one slice across the first axis
    picture = picture_of(volume, 2, "volume")
    slices = [picture[0, GAP : GAP + 64, GAP + i * 65 : GAP + i * 65 + 64] for i in range(3)]
    assert (slices[0] == 255).all()
    for one in slices[1:]:  # in the others it is a line
        assert (one[32] == 255).all()
        assert (one == 255).sum() == 64
    # Where the axes have different lengths, the slices have different heights.
    assert picture_of(torch.randn(4, 2, 6, 5, 9), 2, "volume").shape[0] == 3


@pytest.mark.parametrize("numbers", [1, 2, 3, 7])
def test_vectors_share_one_plot(numbers):
    few, many = (picture_of(torch.randn(n, numbers), 3, "vector") for n in (4, 300))
    assert few.shape == many.shape
    count = [len(places(picture, PALETTE[0], within=250)[0]) for picture in (few, many)]
    assert 0 < count[0] != count[1]


SHAPES = {"signal": (2, 9), "volume": (1, 4, 4, 4), "points": (3, 5), "vector": (2,)}


@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_is_a_file_even_without_a_finite_number(tmp_path, kind):
    samples = torch.randn(3, *SHAPES[kind])
    for number, values in enumerate((samples, samples * torch.nan, torch.ones_like(samples))):
        path = tmp_path / f"{number}.png"
        picture = save_grid(values, path, 2, kind=kind)
        with Image.open(path) as written:
            assert written.size == (picture.shape[2], picture.shape[1])


def test_without_a_kind_the_shape_decides():
    for kind in ("signal", "volume", "vector"):
        samples = torch.randn(3, *SHAPES[kind])
        assert torch.equal(picture_of(samples, 2), picture_of(samples, 2, kind))
        assert torch.equal(picture_of(samples, 2, "latents"), picture_of(samples, 2, kind))
    with pytest.raises(ValueError, match="'graph'"):
        picture_of(torch.randn(3, 2), 2, "graph")
