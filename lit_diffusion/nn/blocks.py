"""The layers of the U-Net: residual blocks, attention to itself and to a text, and upsampling.

Each works on features with one, two or three spatial axes: series, images or volumes.

Legend: B batch, C channels, * the spatial axes, such as H × W pixels, E width of the embedding of
(λ, label).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.nn.cross_attention import CrossAttention

#: The convolution for a number of spatial axes.
CONVOLUTION: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {
    1: nn.Conv1d,
    2: nn.Conv2d,
    3: nn.Conv3d,
}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm over groups of at least four channels, at most 32 of them."""
    largest = max(1, min(32, channels // 4))
    groups = next(n for n in range(largest, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def zero_initialized(layer: nn.Module) -> nn.Module:
    """The layer with its parameters set to zero: a residual branch that is initially zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """A residual block of two convolutions, modulated by the embedding: h ← h + f(h; e).

    Between the convolutions the features are normalised, then scaled by 1 + s(e) and shifted by
    b(e). The last convolution is zero-initialised, so the branch of a new network is zero.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output; if they differ, the identity becomes a 1×1
            convolution.
        embedding: Width E of the embedding.
        dropout: Probability of dropping a feature before the last convolution, in [0, 1).
        dims: Number of spatial axes: 1, 2 or 3.

    Shapes:
        h (B, channels_in, *), embedding (B, E) → (B, channels_out, *).

    References:
        Dhariwal & Nichol (2021), Diffusion Models Beat GANs, arXiv:2105.05233, Section 3.
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        dropout: float = 0.0,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_in = group_norm(channels_in)
        convolution = CONVOLUTION[dims]
        self.conv_in = convolution(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = group_norm(channels_out, affine=False)
        self.conv_out = zero_initialized(convolution(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.identity = nn.Identity() if same else convolution(channels_in, channels_out, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Add the output of the convolutions to ``h``."""
        vectors = self.modulation(embedding)
        scale, shift = vectors.view(*vectors.shape, *[1] * (h.dim() - 2)).chunk(2, dim=1)
        branch = self.conv_in(F.silu(self.norm_in(h)))
        branch = torch.addcmul(shift, self.norm_out(branch), 1 + scale)
        branch = F.dropout(F.silu(branch), self.dropout, self.training)
        return self.identity(h) + self.conv_out(branch)


class Attention(nn.Module):
    """Residual self-attention over all positions.

    Args:
        channels: Channels in and out.
        heads: Number of heads, a divisor of ``channels``.

    Shapes:
        h (B, C, *) → (B, C, *).
    """

    def __init__(self, channels: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.project = zero_initialized(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        """Add the output of the attention to ``h``."""
        tokens = self.norm(h).flatten(2).transpose(1, 2)  # (B, N, C)
        packed = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
        seen = F.scaled_dot_product_attention(query, key, value)
        out = self.project(seen.transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


class TextAttention(nn.Module):
    """Residual attention of all positions to the tokens of a text.

    The projection is zero-initialised, so a new network does not look at its text yet.

    Args:
        channels: Channels in and out.
        context: Width F of a token.
        heads: Number of heads, a divisor of ``channels``.

    Shapes:
        h (B, C, *), tokens (B, T, F), mask (B, T) → (B, C, *).
    """

    def __init__(self, channels: int, context: int, heads: int = 1) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.attend = CrossAttention(channels, context, heads)
        zero_initialized(self.attend.project)

    def forward(self, h: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        """Add the output of the attention to ``h``."""
        positions = self.norm(h).flatten(2).transpose(1, 2)  # (B, N, C)
        out = self.attend(positions, tokens, mask)
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


class Upsample(nn.Module):
    """Nearest-neighbour upsampling to a given size, followed by a convolution of width 3.

    The size is that of the next skip connection, so 9 pixels that became 5 become 9 again. If it
    is exactly double, a window of 3 pixels covers only 2 different ones along each axis: of an
    image, nine weights sum to four, and both operations are one transposed convolution with a 4×4
    kernel, which gives the same numbers up to rounding at less than half the cost.

    Args:
        channels: Channels in and out.
        dims: Number of spatial axes: 1, 2 or 3.

    Shapes:
        h (B, C, *) → (B, C, *size).
    """

    def __init__(self, channels: int, dims: int = 2) -> None:
        super().__init__()
        self.conv = CONVOLUTION[dims](channels, channels, 3, padding=1)

    def forward(self, h: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarge ``h`` to ``size``."""
        dims = h.dim() - 2
        if tuple(size) == tuple(2 * side for side in h.shape[2:]):
            kernel = _sums_of_neighbours(self.conv.weight).transpose(0, 1)
            kernel = kernel.flip(tuple(range(2, 2 + dims)))
            return _TRANSPOSED[dims](h, kernel, self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(h, size=tuple(size), mode="nearest"))


def _sums_of_neighbours(weight: Tensor) -> Tensor:
    """The sums over windows of two along each spatial axis, zeros outside: sides of 3 become 4."""
    if weight.dim() == 4:
        return F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)
    if weight.dim() == 5:
        return F.avg_pool3d(weight, 2, stride=1, padding=1, divisor_override=1)
    return 2 * F.avg_pool1d(weight, 2, stride=1, padding=1)


class Block(nn.Module):
    """A residual block, followed by attention if ``heads`` is given, and by that to a text.

    Args:
        channels_in: Channels of the input.
        channels_out: Channels of the output.
        embedding: Width E of the embedding.
        dropout: Probability of dropping a feature, in [0, 1).
        heads: Number of attention heads; None for no attention, neither to itself nor to a text.
        dims: Number of spatial axes: 1, 2 or 3.
        context: Width F of the tokens of a text; None for no text.

    Shapes:
        h (B, channels_in, *), with ``skip`` concatenated to it if there is one, embedding (B, E),
        tokens (B, T, F), mask (B, T) → (B, channels_out, *).
    """

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        dropout: float = 0.0,
        heads: int | None = None,
        dims: int = 2,
        context: int | None = None,
    ) -> None:
        super().__init__()
        self.residual = ResBlock(channels_in, channels_out, embedding, dropout, dims)
        self.attend = nn.Identity() if heads is None else Attention(channels_out, heads)
        self.read: TextAttention | None = None
        if heads is not None and context is not None:
            self.read = TextAttention(channels_out, context, heads)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        skip: Tensor | None = None,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Transform ``h``, given the embedding and the text."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        h = self.attend(self.residual(h, embedding))
        return h if self.read is None else self.read(h, tokens, mask)
