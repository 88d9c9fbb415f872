"""The U-Net: an encoder–decoder with skip connections.

In the encoder each level halves the image and widens the channels, so that a 3×3 convolution
covers a larger part of the image at the same cost. In the decoder each block also takes the
features of the encoder at the same level, concatenated as a *skip connection*, which restores
fine detail. A diffusion network must behave differently at different noise levels, so λ scales and
shifts the normalised features inside every block (adaptive group norm).

    z ─ conv ─ block ─╮         level 0, channels[0]         ╭─ block ─ block ─ norm, conv ─ out
                  half the size                       double the size
                      ╰─ block ─╮     level 1, ...     ╭─ block ─ block
                                ╰─ block, attend, block

The same network with convolutions over one axis is for series, and over three for volumes.

Legend: B batch, C channels, H × W pixels, E width of the embedding of (λ, label).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.nn.blocks import (
    CONVOLUTION,
    Block,
    TextAttention,
    Upsample,
    group_norm,
    zero_initialized,
)
from lit_diffusion.nn.embeddings import ConditionalNetwork, FourierWaves
from lit_diffusion.nn.text import TextEncoder


class Skip(NamedTuple):
    """A skip connection: the level it comes from, and its number of channels."""

    level: int
    channels: int


def _check_shape(shape: Sequence[int], channels: Sequence[int], downsample: bool) -> None:
    """Raise unless images and levels fit together."""
    if not 2 <= len(shape) <= 4 or min(shape) < 1:
        raise ValueError(
            "shape must be positive integers (C, H, W), or (C, L) for series, or "
            f"(C, D, H, W) for volumes, got {tuple(shape)}."
        )
    if not channels or min(channels) < 1:
        raise ValueError(
            "channels must name a positive number of features for each level, such as "
            f"(32, 64), got {channels}."
        )
    _check_sides(shape[1:], len(channels) if downsample else 1)


def _check_sides(sides: Sequence[int], levels: int) -> None:
    """Raise unless the image can be halved so often."""
    if min(sides) < 2 ** (levels - 1):
        raise ValueError(
            f"{levels} levels halve the image {levels - 1} times, for which "
            f"{'x'.join(map(str, sides))} pixels are too few; give fewer channels."
        )


def _check_numbers(
    blocks: int,
    fourier: Sequence[int],
    dropout: float,
    head_channels: int,
    embedding_features: int | None,
) -> None:
    """Raise if a number is outside its range."""
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


def _channels_last(dims: int) -> torch.memory_format:
    """The memory format with the channels innermost."""
    if dims == 1:
        raise ValueError("channels_last is for images and volumes, got a series; leave it False.")
    return torch.channels_last if dims == 2 else torch.channels_last_3d


class UNet(ConditionalNetwork):
    """A U-Net for images, series or volumes, conditioned on λ, labels, numbers and texts.

    The default choice: convolutions need less data and fewer steps than a transformer. The output
    is exactly zero at initialisation. ``shape`` fixes the channels and which levels have
    attention; images of any other size are accepted as well. With ``downsample=False`` it has the
    form of Variational Diffusion Models, designed for likelihood: every block at full resolution,
    attention only in the middle. For likelihood also give ``fourier``: on the digits it reduced
    4.1 bits/dim to 1.8.

    Args:
        shape: (C, H, W) of the images; (C, L) for series and (C, D, H, W) for volumes.
        channels: Features of each level, from the finest to the coarsest; each further level
            halves the image.
        blocks: Residual blocks per level of the encoder, at least 1; the decoder has one for
            every skip connection.
        attention: Heights of the feature maps that get attention (lengths of series, depths of
            volumes), counted for examples of ``shape``; one that does not occur is ignored.
            If ``downsample`` is False, listing H puts attention in the middle.
        num_classes: Number of classes, for a class-conditional network; None for none.
        dropout: Probability of dropping a feature inside a block, in [0, 1).
        downsample: Whether each further level halves the image.
        embedding_features: Width E of the embedding of λ and label; None means 4·``channels[0]``.
        head_channels: Channels per attention head; a level with fewer has one head.
        fourier: Exponents n of the waves sin(2ⁿπz), cos(2ⁿπz) given as input with z, such as
            (6, 7) for 256 grey levels and (3, 4) for 17; () for none.
        conditions: Further conditions, by name, with the number of values of each, such as
            {attributes: 40}, each of size about 1; None for none.
        text: Encoder of the condition ``text``, at whose tokens every block with attention looks
            as well; None for no texts.
        augment: Number of values that describe how an image was augmented, 9 for ``data.augment``,
            which the command line gives by itself; None for none.
        activation_checkpointing: Keep of each block only what goes into it, and compute the rest
            again in the backward pass: the same gradients for less memory, and up to a third more
            arithmetic.
        channels_last: Store features and weights in the order NHWC, in which most convolutions are
            faster (on a CPU by 2 to 6 %); the numbers agree up to rounding. Not for series.

    Shapes:
        z (B, C, H, W), logsnr (B,), label (B,) int64 in [−1, num_classes) or None → (B, C, H, W);
        of series (B, C, L), of volumes (B, C, D, H, W). Label −1 means "no label", None means all
        −1. Each further condition is (B, *), and zero where dropped (B,), bool; none at all means
        all dropped. A text is (B, T), as its encoder takes it, and augment (B, K), None for zeros.

    References:
        Ronneberger et al. (2015), U-Net, arXiv:1505.04597. Ho et al. (2020), Denoising Diffusion
        Probabilistic Models, arXiv:2006.11239, Appendix B. Kingma et al. (2021), Variational
        Diffusion Models, arXiv:2107.00630, Appendix B (``downsample=False``).

    Example:
        >>> net = UNet(shape=(3, 16, 24), channels=(16, 32), attention=(8,), num_classes=10)
        >>> z, logsnr = torch.randn(2, 3, 16, 24), torch.tensor([-1.0, 4.0])
        >>> net(z, logsnr, label=torch.tensor([7, -1])).shape
        torch.Size([2, 3, 16, 24])
        >>> net(z, logsnr).abs().max().item()  # zero at initialisation
        0.0
        >>> series = UNet(shape=(2, 100), channels=(16, 32), attention=())
        >>> series(torch.randn(5, 2, 100), torch.zeros(5)).shape
        torch.Size([5, 2, 100])
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 8, 8),
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
        text: TextEncoder | None = None,
        augment: int | None = None,
        activation_checkpointing: bool = False,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        _check_shape(shape, channels, downsample)
        _check_numbers(blocks, fourier, dropout, head_channels, embedding_features)
        self.shape = tuple(shape)
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
        self.augment = augment
        self.activation_checkpointing = activation_checkpointing
        self.channels_last = channels_last

        # The order of construction fixes the first weights under a seed.
        self.make_embeddings(self._embedding_width, num_classes, self.conditions, text, augment)
        self.waves = FourierWaves(self.fourier)
        self.down, skips = self._encoder()
        self.middle = self._bottleneck()
        self.up = self._decoder(skips)
        if text is not None and not any(isinstance(m, TextAttention) for m in self.modules()):
            raise ValueError(
                "the network looks at a text where it has attention, which is at none of its "
                f"heights {self._heights()}, got attention={self.attention}: add one of them."
            )
        self.norm_out = group_norm(self.channels[0])
        self.conv_out = zero_initialized(
            self._convolution(self.channels[0], shape[0], 3, padding=1)
        )
        if channels_last:  # features take the order of the weights
            self.to(memory_format=_channels_last(self._dims))

    @property
    def _dims(self) -> int:
        """Number of spatial axes."""
        return len(self.shape) - 1

    @property
    def _convolution(self) -> type[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
        return CONVOLUTION[self._dims]

    def _encoder(self) -> tuple[nn.ModuleList, list[Skip]]:
        """The layers of the encoder, and the skip connection of each."""
        width = self.channels[0]
        seen = self.shape[0] * (1 + 2 * len(self.fourier))
        layers: list[nn.Module] = [self._convolution(seen, width, 3, padding=1)]
        skips = [Skip(0, width)]
        for level, wide in enumerate(self.channels):
            if level > 0 and self.downsample:
                layers.append(self._convolution(width, width, 3, stride=2, padding=1))
                skips.append(Skip(level, width))
            for _ in range(self.blocks):
                layers.append(self._block(width, wide, self._attends(level)))
                skips.append(Skip(level, wide))
                width = wide
        return nn.ModuleList(layers), skips

    def _bottleneck(self) -> nn.ModuleList:
        """Two blocks at the coarsest level, with attention after the first."""
        width, attend = self.channels[-1], self._heights()[-1] in self.attention
        return nn.ModuleList([self._block(width, width, attend), self._block(width, width, False)])

    def _decoder(self, skips: list[Skip]) -> nn.ModuleList:
        """The layers of the decoder: one block per skip connection, from the last to the first."""
        width = self.channels[-1]
        layers: list[nn.Module] = []
        finer = [None, *skips[:-1]]
        for skip, following in zip(reversed(skips), reversed(finer), strict=True):
            wide = self.channels[skip.level]
            layers.append(self._block(width + skip.channels, wide, self._attends(skip.level)))
            width = wide
            if self.downsample and following is not None and following.level < skip.level:
                layers.append(Upsample(width, self._dims))
        return nn.ModuleList(layers)

    @property
    def _embedding_width(self) -> int:
        given = self.embedding_features
        return 4 * self.channels[0] if given is None else given

    def _heights(self) -> list[int]:
        """Height of the feature maps at each level, for images of ``shape``."""
        heights = [self.shape[1]]
        for _ in self.channels[1:]:
            heights.append((heights[-1] + 1) // 2 if self.downsample else heights[-1])
        return heights

    def _attends(self, level: int) -> bool:
        """Whether the blocks of a level have attention; none has it without downsampling."""
        return self.downsample and self._heights()[level] in self.attention

    def _block(self, channels_in: int, channels_out: int, attend: bool) -> Block:
        heads = self._heads(channels_out) if attend else None
        width, dims = self._embedding_width, self._dims
        context = None if self.text is None else self.text.width
        return Block(channels_in, channels_out, width, self.dropout, heads, dims, context)

    def _heads(self, channels: int) -> int:
        """Number of attention heads for so many channels."""
        heads = max(1, channels // self.head_channels)
        if channels % heads:
            raise ValueError(
                f"{channels} channels cannot be shared among {heads} attention heads; give a "
                f"multiple of head_channels, which is {self.head_channels}."
            )
        return heads

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless the network takes examples of this shape: of its channels and any size.

        Args:
            shape: (C, H, W), or (C, L), or (C, D, H, W).

        Raises:
            ValueError: If the channels or the number of axes differ, or a side is too small to be
                halved once per level.
        """
        if len(shape) != len(self.shape) or shape[0] != self.shape[0] or min(shape) < 1:
            raise ValueError(
                f"this UNet takes examples of {self.shape[0]} channels and any "
                f"{self._dims} sides, got {tuple(shape)}."
            )
        _check_sides(shape[1:], len(self.channels) if self.downsample else 1)

    def forward(
        self,
        z: Tensor,
        logsnr: Tensor,
        label: Tensor | None = None,
        dropped: Tensor | None = None,
        augment: Tensor | None = None,
        **cond: Tensor,
    ) -> Tensor:
        """Map noisy images to a prediction of the same shape and type."""
        others, tokens, mask = self.read_text(cond, len(z))
        embedding = F.silu(self.embed(logsnr, label, dropped, others, augment))

        h, skips = self.waves(z), []
        for step in self.down:
            if isinstance(step, Block):
                h = self.call_block(step, h, embedding, None, tokens, mask)
            else:
                h = step(h)
            skips.append(h)
        for step in self.middle:
            h = self.call_block(step, h, embedding, None, tokens, mask)
        for step in self.up:
            if isinstance(step, Upsample):
                h = step(h, skips[-1].shape[2:])
            else:
                h = self.call_block(step, h, embedding, skips.pop(), tokens, mask)
        return self.conv_out(F.silu(self.norm_out(h))).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments, except for an encoder of texts, which is shown as a submodule."""
        names = (
            "shape, channels, blocks, attention, num_classes, dropout, downsample, "
            "embedding_features, head_channels, fourier, conditions, text, augment, "
            "activation_checkpointing, channels_last"
        )
        plain = [name for name in names.split(", ") if name != "text" or self.text is None]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in plain)
