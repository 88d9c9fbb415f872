"""The U-Net: an image goes down to where all of it is in sight, and comes up beside its copies.

On the way down each level halves the image and widens the channels, so a 3×3 convolution sees
further at the same cost. On the way up each block is handed, by concatenation, what the step
opposite left on the way down (a *skip*): coarse knowledge meets fine detail. One more idea fits
it for diffusion: it must act quite differently at different noise levels, so λ scales and shifts
the normalised features inside every block (adaptive group norm).

    z ─ conv ─ block ─╮         level 0, channels[0]         ╭─ block ─ block ─ norm, conv ─ out
                  half the size                       double the size
                      ╰─ block ─╮     level 1, ...     ╭─ block ─ block
                                ╰─ block, attend, block

Legend: B batch, C channels, H × W pixels, E width of the embedding of (λ, label).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.nn.embeddings import FourierWaves, SteeredNetwork


def _group_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm over groups of at least four channels, at most 32 of them."""
    largest = max(1, min(32, channels // 4))
    groups = next(n for n in range(largest, 0, -1) if channels % n == 0)
    return nn.GroupNorm(groups, channels, affine=affine)


def _zero(layer: nn.Module) -> nn.Module:
    """The layer with its parameters set to zero: a residual branch that starts as nothing."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class ResBlock(nn.Module):
    """Two convolutions beside an identity, steered by the embedding: h ← h + f(h; e).

    Between the convolutions the features are normalised, then scaled by 1 + s(e) and shifted by
    b(e). The last convolution starts at zero, so a new network is a plain path from input to
    output.

    Args:
        channels_in: Channels that come in.
        channels_out: Channels that go out; if they differ, the identity becomes a 1×1 convolution.
        embedding: Width E of the embedding.
        dropout: Probability of dropping a feature before the last convolution, in [0, 1).

    Shapes:
        h (B, channels_in, H, W), embedding (B, E) → (B, channels_out, H, W).

    References:
        Dhariwal & Nichol (2021), Diffusion Models Beat GANs, arXiv:2105.05233, Section 3.
    """

    def __init__(
        self, channels_in: int, channels_out: int, embedding: int, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.norm_in = _group_norm(channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = _group_norm(channels_out, affine=False)
        self.conv_out = _zero(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.identity = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Add to ``h`` what the convolutions make of it at this noise level."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        branch = self.conv_in(F.silu(self.norm_in(h)))
        branch = torch.addcmul(shift, self.norm_out(branch), 1 + scale)
        branch = F.dropout(F.silu(branch), self.dropout, self.training)
        return self.identity(h) + self.conv_out(branch)


class Attention(nn.Module):
    """Every pixel looks at every other: self-attention over the H·W positions, added to its input.

    Args:
        channels: Channels in and out.
        heads: Number of heads, a divisor of ``channels``.

    Shapes:
        h (B, C, H, W) → (B, C, H, W).
    """

    def __init__(self, channels: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = _group_norm(channels)
        self.query_key_value = nn.Linear(channels, 3 * channels)
        self.project = _zero(nn.Linear(channels, channels))

    def forward(self, h: Tensor) -> Tensor:
        """Add to ``h`` what each position gathers from all."""
        tokens = self.norm(h).flatten(2).transpose(1, 2)  # (B, H·W, C)
        packed = self.query_key_value(tokens).unflatten(2, (3, self.heads, -1))
        query, key, value = packed.permute(2, 0, 3, 1, 4)  # each (B, heads, H·W, C / heads)
        seen = F.scaled_dot_product_attention(query, key, value)
        out = self.project(seen.transpose(1, 2).flatten(2))
        return h + out.transpose(1, 2).unflatten(2, h.shape[2:])


class Upsample(nn.Module):
    """Enlarge to a given size by repeating pixels, then smooth by a 3×3 convolution.

    The size is that of the skip to be met next, so 9 pixels that became 5 come back as 9. Where
    it is exactly double, a window of 3×3 sees only 2×2 different pixels: its nine weights fall
    together into four, and the whole is one transposed convolution with a kernel of 4×4, the
    same numbers to rounding at less than half the work.

    Args:
        channels: Channels in and out.

    Shapes:
        h (B, C, h, w) → (B, C, H, W) with (H, W) = ``size``.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, h: Tensor, size: Sequence[int]) -> Tensor:
        """Enlarge ``h`` to ``size``."""
        if tuple(size) == (2 * h.shape[2], 2 * h.shape[3]):
            weight = self.conv.weight
            kernel = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # sums
            kernel = kernel.transpose(0, 1).flip(2, 3)
            return F.conv_transpose2d(h, kernel, self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(h, size=tuple(size), mode="nearest"))


class Block(nn.Module):
    """A residual block and, where ``heads`` is given, attention behind it."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        embedding: int,
        dropout: float = 0.0,
        heads: int | None = None,
    ) -> None:
        super().__init__()
        self.residual = ResBlock(channels_in, channels_out, embedding, dropout)
        self.attend = nn.Identity() if heads is None else Attention(channels_out, heads)

    def forward(self, h: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        """(B, channels_in, H, W) → (B, channels_out, H, W); ``skip`` is put beside ``h``."""
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        return self.attend(self.residual(h, embedding))


class UNet(SteeredNetwork):
    """A U-Net for images of any size, steered by λ and, if wanted, by a label and other numbers.

    The workhorse: convolutions do with little data and few steps, where a transformer needs many
    of both. The output starts at exactly zero. ``image_shape`` fixes the channels and where
    attention stands; images of other sizes pass as well. With ``downsample=False`` it takes the
    shape of Variational Diffusion Models, made for likelihood: every block at full resolution,
    attention only in the middle. For likelihood give ``fourier``, too: on the digits it took 4.1
    bits/dim to 1.8.

    Args:
        image_shape: (C, H, W) of the images.
        channels: Features of each level, from the finest to the coarsest; each further level
            halves the image.
        blocks: Residual blocks per level on the way down, at least 1; the way up has one for every
            skip, which makes one more.
        attention: Heights of the feature maps that get attention, counted for images of
            ``image_shape``; a height that does not occur is passed over. If ``downsample`` is
            False, listing H puts attention in the middle.
        num_classes: Number of classes, for a class-conditional network; None for none.
        dropout: Probability of dropping a feature inside a block, in [0, 1).
        downsample: Whether each further level halves the image.
        embedding_features: Width E of the embedding of λ and label; None means 4·``channels[0]``.
        head_channels: Channels per attention head; a level with fewer has one head.
        fourier: Exponents n of the waves sin(2ⁿπz), cos(2ⁿπz) shown beside z, such as (6, 7) for
            256 grey levels and (3, 4) for 17; () for none.
        conditions: What else the network is told of an example, by name, and how many numbers
            that is, such as {attributes: 40}, each of size about 1; None for nothing.
        activation_checkpointing: Keep of each block only what goes into it, and compute the rest
            again in the backward pass: the same gradients for less memory, and up to a third more
            arithmetic.
        channels_last: Keep the features of a pixel side by side in memory, weights included, in
            which order most convolutions are faster (on a CPU by 2 to 6 %); the numbers agree to
            rounding.

    Shapes:
        z (B, C, H, W), logsnr (B,), label (B,) int64 in [−1, num_classes) or None → (B, C, H, W).
        Label −1 means "no label", None means all −1. Each further condition is (B, *), and zero
        where dropped (B,), bool; none at all means all dropped.

    References:
        Ronneberger et al. (2015), U-Net, arXiv:1505.04597. Ho et al. (2020), Denoising Diffusion
        Probabilistic Models, arXiv:2006.11239, Appendix B. Kingma et al. (2021), Variational
        Diffusion Models, arXiv:2107.00630, Appendix B (``downsample=False``).

    Example:
        >>> net = UNet(image_shape=(3, 16, 24), channels=(16, 32), attention=(8,), num_classes=10)
        >>> z, logsnr = torch.randn(2, 3, 16, 24), torch.tensor([-1.0, 4.0])
        >>> net(z, logsnr, label=torch.tensor([7, -1])).shape
        torch.Size([2, 3, 16, 24])
        >>> net(z, logsnr).abs().max().item()  # at first it says nothing
        0.0
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (1, 8, 8),
        channels: tuple[int, ...] = (32, 64),
        blocks: int = 1,
        attention: tuple[int, ...] = (4,),
        num_classes: int | None = None,
        dropout: float = 0.0,
        downsample: bool = True,
        embedding_features: int | None = None,
        head_channels: int = 64,
        fourier: tuple[int, ...] = (),
        conditions: dict[str, int] | None = None,
        activation_checkpointing: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(
                f"image_shape must be three positive integers (C, H, W), got {image_shape}."
            )
        image_channels, height, image_width = image_shape
        if not channels or min(channels) < 1:
            raise ValueError(
                "channels must name a positive number of features for each level, such as "
                f"(32, 64), got {channels}."
            )
        if downsample and min(height, image_width) < 2 ** (len(channels) - 1):
            raise ValueError(
                f"{len(channels)} levels halve the image {len(channels) - 1} times, for which "
                f"{height}x{image_width} pixels are too few; give fewer channels."
            )
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}.")
        if fourier and min(fourier) < 0:
            raise ValueError(f"fourier must name exponents of at least 0, got {fourier}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}.")
        if head_channels < 1 or (embedding_features is not None and embedding_features < 1):
            raise ValueError(
                "head_channels and embedding_features must be at least 1, "
                f"got {head_channels} and {embedding_features}."
            )
        self.image_shape = (image_channels, height, image_width)
        self.channels = tuple(channels)
        self.blocks = blocks
        self.attention = tuple(attention)
        self.num_classes = num_classes
        self.dropout = dropout
        self.downsample = downsample
        self.embedding_features = embedding_features
        self.head_channels = head_channels
        self.fourier = tuple(fourier)
        self.conditions = dict(conditions or {})
        self.activation_checkpointing = activation_checkpointing
        self.channels_last = channels_last

        features = 4 * channels[0] if embedding_features is None else embedding_features
        self.make_steering(features, num_classes, self.conditions)

        def block(channels_in: int, channels_out: int, attend: bool) -> Block:
            heads = self._heads(channels_out) if attend else None
            return Block(channels_in, channels_out, features, dropout, heads)

        # Down. Each step leaves a skip; `skips` remembers its level and how many channels it has.
        self.waves = FourierWaves(self.fourier)
        seen = image_channels * (1 + 2 * len(self.fourier))
        width = channels[0]
        steps: list[nn.Module] = [nn.Conv2d(seen, width, 3, padding=1)]
        skips = [(0, width)]
        attends = []
        for level, wide in enumerate(channels):
            if level > 0 and downsample:
                height = (height + 1) // 2
                steps.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                skips.append((level, width))
            attends.append(downsample and height in attention)
            for _ in range(blocks):
                steps.append(block(width, wide, attends[level]))
                skips.append((level, wide))
                width = wide
        self.down = nn.ModuleList(steps)

        bottom = height in attention
        self.middle = nn.ModuleList([block(width, width, bottom), block(width, width, False)])

        # Up, the mirror image: one block for each skip, from the last to the first.
        steps = []
        for i, (level, skip) in reversed(list(enumerate(skips))):
            steps.append(block(width + skip, channels[level], attends[level]))
            width = channels[level]
            if downsample and i > 0 and skips[i - 1][0] < level:
                steps.append(Upsample(width))
        self.up = nn.ModuleList(steps)

        self.norm_out = _group_norm(width)
        self.conv_out = _zero(nn.Conv2d(width, image_channels, 3, padding=1))
        if channels_last:  # features follow their first weights
            self.to(memory_format=torch.channels_last)

    def _heads(self, channels: int) -> int:
        """Number of attention heads for so many channels."""
        heads = max(1, channels // self.head_channels)
        if channels % heads:
            raise ValueError(
                f"{channels} channels cannot be shared among {heads} attention heads; give a "
                f"multiple of head_channels, which is {self.head_channels}."
            )
        return heads

    def forward(
        self,
        z: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        dropped: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Map noisy images to a prediction of the same shape and type."""
        embedding = F.silu(self.steer(logsnr, label, dropped, cond))

        h, skips = self.waves(z), []
        for step in self.down:
            h = self.recall(step, h, embedding) if isinstance(step, Block) else step(h)
            skips.append(h)
        for step in self.middle:
            h = self.recall(step, h, embedding)
        for step in self.up:
            if isinstance(step, Upsample):
                h = step(h, skips[-1].shape[2:])
            else:
                h = self.recall(step, h, embedding, skips.pop())
        return self.conv_out(F.silu(self.norm_out(h))).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        names = (
            "image_shape, channels, blocks, attention, num_classes, dropout, downsample, "
            "embedding_features, head_channels, fourier, conditions, activation_checkpointing, "
            "channels_last"
        )
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names.split(", "))
