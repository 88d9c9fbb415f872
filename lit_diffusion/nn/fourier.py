"""Any network, shown fine waves of its input: what exact likelihoods need.

Legend: B batch, C channels, H × W pixels, K exponents.
"""

from typing import Any

from torch import Tensor, nn

from lit_diffusion.nn.embeddings import FourierWaves
from lit_diffusion.nn.unet import UNet


class FourierFeatures(nn.Module):
    """A network that sees z beside its waves: f([z, sin(2ⁿπz), cos(2ⁿπz), ...], λ), first C of it.

    Data come in grey levels, so at little noise the best guess is the nearest level: a staircase
    of z, far too fine for a network that sees only z. The waves have the period of the steps. For
    likelihood they are worth more than any change of architecture; for how samples look they
    hardly matter. This puts them before any network; `UNet` also takes them as an argument.

    Args:
        network: Maps images of C·(1 + 2K) channels to the same shape, like all networks here;
            None means a `UNet` for that shape.
        exponents: The K integers n, each at least 0. A wave has period 2¹⁻ⁿ: (6, 7) for 256 grey
            levels on [−1, 1], (3, 4) for 17; a small network of few inputs also gains from all
            that are coarser.
        image_shape: (C, H, W) of the images.

    Shapes:
        z (B, C, H, W), logsnr (B,), label (B,) int64 or None → (B, C, H, W). The waves are
        computed in float32 at least, under autocast too: bfloat16 has no digit of a fine phase.

    Raises:
        ValueError: If an exponent is negative, or if the network is built for another shape.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Section 2.5 and
        Appendix C.

    Example:
        >>> from lit_diffusion.nn import ResidualMLP
        >>> inner = ResidualMLP(image_shape=(10, 1, 1))
        >>> net = FourierFeatures(inner, (6, 7), image_shape=(2, 1, 1))
        >>> net(torch.randn(5, 2, 1, 1), torch.zeros(5)).shape
        torch.Size([5, 2, 1, 1])
        >>> FourierFeatures.inner_shapes((2, 1, 1), exponents=(0, 1, 2))  # 2·(1 + 2·3) channels
        {'network': (14, 1, 1)}
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        exponents: tuple[int, ...] = (6, 7),
        image_shape: tuple[int, int, int] = (1, 8, 8),
    ) -> None:
        super().__init__()
        if len(image_shape) != 3 or min(image_shape) < 1:
            raise ValueError(
                f"image_shape must be three positive integers (C, H, W), got {image_shape}."
            )
        self.exponents = tuple(exponents)
        self.image_shape = (image_shape[0], image_shape[1], image_shape[2])
        self.waves = FourierWaves(self.exponents)
        inner = self.inner_shapes(self.image_shape, self.exponents)["network"]
        self.network = UNet(image_shape=inner) if network is None else network
        built = getattr(self.network, "image_shape", inner)  # a network need not say its shape
        if tuple(built) != inner:
            raise ValueError(
                f"FourierFeatures shows its network images of shape {inner}, "
                f"{image_shape[0]}·(1 + 2·{len(self.exponents)}) channels, but the network is "
                f"built for {tuple(built)}: give it image_shape={inner}, {inner[0]} channels."
            )

    @staticmethod
    def inner_shapes(
        image_shape: tuple[int, int, int],
        exponents: tuple[int, ...] = (6, 7),
        **others: Any,
    ) -> dict[str, tuple[int, int, int]]:
        """The image_shape that each network among the arguments must be built for, by its name.

        A wrapper that has this method gets its inner networks' shapes set by the command line, so
        that a config says the shape once.

        Args:
            image_shape: (C, H, W) of the images.
            exponents: As for the class.
            **others: Its other arguments, which do not matter.
        """
        channels, height, width = image_shape
        return {"network": (channels * (1 + 2 * len(exponents)), height, width)}

    @property
    def num_classes(self) -> int | None:
        """Number of classes the inner network knows; None if it takes no labels."""
        return getattr(self.network, "num_classes", None)

    @property
    def conditions(self) -> dict[str, int] | None:
        """What else the inner network is told; None if it does not say."""
        return getattr(self.network, "conditions", None)

    def forward(
        self, z: Tensor, logsnr: Tensor, label: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """Map noisy images to a prediction of the same shape."""
        out: Tensor = self.network(self.waves(z), logsnr, label, **cond)
        # Only as many channels as there are images; what stands beside them learns nothing.
        return out[:, : z.shape[1]]

    def extra_repr(self) -> str:
        """The arguments, but for the network, which is shown as a part."""
        return f"exponents={self.exponents}, image_shape={self.image_shape}"
