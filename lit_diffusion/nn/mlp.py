"""The multilayer perceptron: for data of a few numbers without spatial structure.

Legend: B batch, D numbers of an example, such as C·H·W, F features.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_diffusion.nn.embeddings import ConditionalNetwork


class MLPBlock(nn.Module):
    """A residual block of two linear layers, modulated by the embedding: h ← h + f(h; e).

    Between the layers the features are scaled by 1 + s(e) and shifted by b(e). The last layer is
    zero-initialised.

    Args:
        features: Width F, at least 1.

    Shapes:
        h (B, F), embedding (B, F) → (B, F).
    """

    def __init__(self, features: int = 256) -> None:
        super().__init__()
        self.features = features
        self.norm = nn.LayerNorm(features)
        self.layer_in = nn.Linear(features, features)
        self.modulation = nn.Linear(features, 2 * features)
        self.layer_out = nn.Linear(features, features)
        nn.init.zeros_(self.layer_out.weight)
        nn.init.zeros_(self.layer_out.bias)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Add the output of the layers to ``h``."""
        scale, shift = self.modulation(embedding).chunk(2, dim=1)
        branch = torch.addcmul(shift, self.layer_in(F.silu(self.norm(h))), 1 + scale)
        return h + self.layer_out(F.silu(branch))


class ResidualMLP(ConditionalNetwork):
    """A residual perceptron of z, λ and label: out = W·norm(h), h ← h + f(h; λ, label).

    For data of up to some hundreds of numbers, such as toy densities, tables or codes. It does not
    use the order of the numbers; for images take `UNet`, which uses that neighbouring pixels are
    related. The output is exactly zero at initialisation.

    Args:
        shape: (C, H, W) of the examples, or any other shape, such as (D,) of the rows of a
            table; they are flattened to vectors.
        features: Width F, at least 1.
        layers: Number of residual blocks, at least 1.
        num_classes: Number of classes, for a class-conditional network; None for none.

    Shapes:
        z (B, *), logsnr (B,), label (B,) int64 in [−1, num_classes) or None → (B, *). Label −1
        means "no label", None means all −1.

    Raises:
        ValueError: If a number is below 1, or if z has another shape than ``shape``.

    References:
        Kingma et al. (2021), Variational Diffusion Models, arXiv:2107.00630: a perceptron of two
        layers is the network of its two-dimensional example.

    Example:
        >>> net = ResidualMLP(shape=(2, 1, 1), features=64)
        >>> net(torch.randn(5, 2, 1, 1), torch.zeros(5)).abs().max().item()  # zero at first
        0.0
        >>> sum(p.numel() for p in net.parameters())
        42306
    """

    def __init__(
        self,
        shape: tuple[int, ...] = (1, 8, 8),
        features: int = 256,
        layers: int = 2,
        num_classes: int | None = None,
    ) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise ValueError(f"shape must be positive integers, such as (C, H, W), got {shape}.")
        if min(features, layers) < 1:
            raise ValueError(
                f"features and layers must be at least 1, got {features} and {layers}."
            )
        self.shape = tuple(shape)
        self.features = features
        self.layers = layers
        self.num_classes = num_classes
        size = math.prod(shape)
        self.make_embeddings(features, num_classes, conditions={})
        self.layer_in = nn.Linear(size, features)
        self.blocks = nn.ModuleList(MLPBlock(features) for _ in range(layers))
        self.norm_out = nn.LayerNorm(features)
        self.layer_out = nn.Linear(features, size)
        nn.init.zeros_(self.layer_out.weight)
        nn.init.zeros_(self.layer_out.bias)

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raise unless it is the shape that the network is built for.

        Args:
            shape: The shape of an example.

        Raises:
            ValueError: If it is another.
        """
        if tuple(shape) != self.shape:
            raise ValueError(
                f"this ResidualMLP was built for examples of shape {self.shape}, got "
                f"{tuple(shape)}; give shape={tuple(shape)}."
            )

    def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None = None) -> Tensor:
        """Map noisy examples to a prediction of the same shape and type."""
        self.check_shape(tuple(z.shape[1:]))
        embedding = F.silu(self.embed(logsnr, label, dropped=None, cond={}))
        h = self.layer_in(z.flatten(1))
        for block in self.blocks:
            h = block(h, embedding)
        return self.layer_out(self.norm_out(h)).view_as(z).to(z.dtype)

    def extra_repr(self) -> str:
        """The arguments."""
        names = ("shape", "features", "layers", "num_classes")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)
