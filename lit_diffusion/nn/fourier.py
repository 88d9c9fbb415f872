"""Fourier features of the input for any network, which likelihoods need.

Legend: B batch, C channels, H × W pixels, K exponents.
"""

from typing import Any

from torch import Tensor, nn

from lit_diffusion.nn.embeddings import FourierWaves
from lit_diffusion.nn.sizes import check_shape
from lit_diffusion.nn.unet import UNet


class FourierFeatures(nn.Module):
    """A network of z and its waves: the first C channels of f([z, sin(2ⁿπz), cos(2ⁿπz), …], λ).

    Data have discrete grey levels, so at low noise the best estimate is the nearest level: a step
    function of z, too fine for a network whose only input is z. The waves have the period of the
    steps. They matter much for likelihood and little for the appearance of samples. This class
    adds them to any network; `UNet` and `DiT` also take them as an argument.

    Args:
        network: Maps images of C·(1 + 2K) channels to the same shape, like all networks here;
            None means a `UNet` for that shape.
        exponents: The K integers n, each at least 0. A wave has period 2¹⁻ⁿ: (6, 7) for 256 grey
            levels on [−1, 1], (3, 4) for 17; a small network of few inputs also gains from the
            coarser ones.
        shape: (C, H, W) of the images, or (C, *) of other data.

    Shapes:
        z (B, C, *), logsnr (B,), label (B,) int64 or None → (B, C, *). The waves are
        computed in float32 at least, under autocast too, since bfloat16 has no digit of a fine
        phase.

    Raises:
        ValueError: If an exponent is negative, or if the network is built for another shape.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630, Section 2.5 and
        Appendix C.

    Example:
        >>> from lit_diffusion.nn import ResidualMLP
        >>> inner = ResidualMLP(shape=(10, 1, 1))
        >>> net = FourierFeatures(inner, (6, 7), shape=(2, 1, 1))
        >>> net(torch.randn(5, 2, 1, 1), torch.zeros(5)).shape
        torch.Size([5, 2, 1, 1])
        >>> FourierFeatures.inner_shapes((2, 1, 1), exponents=(0, 1, 2))  # 2·(1 + 2·3) channels
        {'network': (14, 1, 1)}
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        exponents: tuple[int, ...] = (6, 7),
        shape: tuple[int, ...] = (1, 8, 8),
    ) -> None:
        super().__init__()
        if len(shape) < 2 or min(shape) < 1:
            raise ValueError(f"shape must be positive integers (C, H, W), got {tuple(shape)}.")
        self.exponents = tuple(exponents)
        self.shape = tuple(shape)
        self.waves = FourierWaves(self.exponents)
        inner = self.inner_shapes(self.shape, self.exponents)["network"]
        self.network = UNet(shape=inner) if network is None else network
        built = getattr(self.network, "shape", inner)  # not every network has it
        if tuple(built) != inner:
            raise ValueError(
                f"FourierFeatures passes images of shape {inner} to its network, "
                f"{shape[0]}·(1 + 2·{len(self.exponents)}) channels, but the network is "
                f"built for {tuple(built)}: give it shape={inner}, {inner[0]} channels."
            )

    @staticmethod
    def inner_shapes(
        shape: tuple[int, ...],
        exponents: tuple[int, ...] = (6, 7),
        **others: Any,
    ) -> dict[str, tuple[int, ...]]:
        """The shape for which each network among the arguments must be built, by name.

        The command line sets the shapes of the inner networks of a wrapper that has this method,
        so that a config need not repeat them.

        Args:
            shape: (C, H, W) of the images.
            exponents: As for the class.
            **others: Its other arguments, which are ignored.
        """
        channels, *sides = shape
        return {"network": (channels * (1 + 2 * len(exponents)), *sides)}

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless the inner network takes examples of this shape with their waves.

        Args:
            shape: (C, H, W), or (C, L) and so on.

        Raises:
            ValueError: If it does not.
        """
        check_shape(self.network, self.inner_shapes(shape, self.exponents)["network"])

    @property
    def num_classes(self) -> int | None:
        """Number of classes of the inner network; None if it takes no labels."""
        return getattr(self.network, "num_classes", None)

    @property
    def conditions(self) -> dict[str, int] | None:
        """Further conditions of the inner network; None if it declares none."""
        return getattr(self.network, "conditions", None)

    @property
    def text(self) -> nn.Module | None:
        """Encoder of texts of the inner network; None if it takes no texts."""
        return getattr(self.network, "text", None)

    @property
    def augment(self) -> int | None:
        """Number of values that tell the inner network of an augmentation; None for none."""
        return getattr(self.network, "augment", None)

    def forward(
        self, z: Tensor, logsnr: Tensor, label: Tensor | None = None, **cond: Tensor
    ) -> Tensor:
        """Map noisy images to a prediction of the same shape."""
        out: Tensor = self.network(self.waves(z), logsnr, label, **cond)
        # The first C channels; the others get no gradient.
        return out[:, : z.shape[1]]

    def extra_repr(self) -> str:
        """The arguments except for the network, which is shown as a submodule."""
        return f"exponents={self.exponents}, shape={self.shape}"
