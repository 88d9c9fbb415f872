"""Patches of an image as a sequence of tokens, and the positions of the tokens.

The same for series, of one axis, and for volumes, of three.

Legend: B batch, C channels, H × W pixels, P side of a patch, N tokens, such as H·W / P².
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def patchify(z: Tensor, patch: int) -> Tensor:
    """Cut images into tokens, row by row: (B, C, H, W) → (B, N, C·P·P).

    Series (B, C, L) are cut into tokens of C·P numbers, volumes into tokens of C·P³.

    Args:
        z: Images whose sides are multiples of the patch size.
        patch: Side P of a patch.

    Example:
        >>> patchify(torch.arange(8.0).view(1, 1, 2, 4), patch=2)
        tensor([[[0., 1., 4., 5.],
                 [2., 3., 6., 7.]]])
    """
    dims = z.dim() - 2
    for axis in range(dims):
        z = z.unflatten(2 + 2 * axis, (-1, patch))  # the grid, and the places within a patch
    grid, within = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return z.permute(0, *grid, 1, *within).flatten(1, dims).flatten(2)


def unpatchify(tokens: Tensor, patch: int, sides: Sequence[int]) -> Tensor:
    """Assemble tokens into images, the inverse of `patchify`: (B, N, C·P·P) → (B, C, H, W).

    Args:
        tokens: The tokens, row by row.
        patch: Side P of a patch.
        sides: H and W, in pixels; those of other data likewise.
    """
    dims = len(sides)
    z = tokens.unflatten(2, (-1, *[patch] * dims))
    z = z.unflatten(1, [side // patch for side in sides])  # (B, *grid, C, *within)
    pairs = [axis for k in range(dims) for axis in (1 + k, 2 + dims + k)]
    return z.permute(0, 1 + dims, *pairs).reshape(len(z), -1, *sides)


def phases(places: Sequence[Tensor], waves: int, longest: float, total: int) -> Tensor:
    """The position of each token as phases: ω_k times its place along each axis in turn.

    ω_k = longest^(−k/waves). Computed in float32 at every call. A buffer would be rounded by
    ``.to(torch.bfloat16)`` and would fix the size of the images.

    Args:
        places: The places of the tokens along each axis: of rows, then of columns.
        waves: Number K of frequencies; the first is one radian per token.
        longest: Ratio of the first frequency to that of k = K.
        total: Number of phases of a token, at least that of axes times waves; the rest are 0.

    Shapes:
        places, one (n,) for each axis; result (product of all n, total), float32.

    Example:
        >>> phases([torch.tensor([0.0]), torch.tensor([0.0, 1.0, 2.0])], 2, longest=100, total=4)
        tensor([[0.0000, 0.0000, 0.0000, 0.0000],
                [0.0000, 0.0000, 1.0000, 0.1000],
                [0.0000, 0.0000, 2.0000, 0.2000]])
    """
    device = places[0].device
    omega = longest ** -(torch.arange(waves, dtype=torch.float32, device=device) / waves)
    along = [place.float()[:, None] * omega for place in places]
    grid = [len(place) for place in places]
    for axis, phase in enumerate(along):
        ones = [1] * len(grid)
        ones[axis] = grid[axis]
        along[axis] = phase.view(*ones, waves).expand(*grid, waves).flatten(0, -2)
    found = torch.cat(along, dim=1)
    return F.pad(found, (0, total - found.shape[1]))


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate each pair (x_i, x_{i + D/2}) by its angle, in float32 at least.

    The product of a query and a key that are rotated by their positions depends on the difference
    of the positions only: ⟨R(a)q, R(b)k⟩ = ⟨q, R(b − a)k⟩.

    Args:
        x: Queries or keys.
        angle: Angles, in radians.

    Shapes:
        x (*, N, D), angle (N, D/2) → (*, N, D).

    References:
        Su et al. (2021), RoFormer, arXiv:2104.09864, Section 3.2.2.

    Example:
        >>> rotate(torch.tensor([[1.0, 0.0]]), torch.tensor([[torch.pi / 6]]))
        tensor([[0.8660, 0.5000]])
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
