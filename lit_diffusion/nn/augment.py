"""How an image was augmented, as an input of the network: the augmentation then does not leak.

A network that sees turned and enlarged images learns to make them. One that is told how each was
turned learns the images as they are as the case "not at all", which is a vector of zeros, and is
what every sampler asks for. Such an embedding therefore has no bias: zeros add exactly nothing,
and a network that is not told how an image was augmented takes it as it is.

Legend: B batch, K numbers, F features.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["AugmentEmbedding"]


class AugmentEmbedding(nn.Module):
    """Two linear layers without bias, so that 0 ↦ 0: W₂ silu(W₁ a).

    Args:
        numbers: K, how many numbers describe an augmentation, at least 1.
        features: Width F of the result.

    Shapes:
        augment (B, K), or None for zeros → (B, F).

    Raises:
        ValueError: If there is not at least one number, or others come.

    References:
        Karras et al. (2022), Elucidating the Design Space of Diffusion-Based Generative Models,
        arXiv:2206.00364, Appendix F.2.

    Example:
        >>> AugmentEmbedding(9, features=4)(None, 1)
        tensor([[0., 0., 0., 0.]], grad_fn=<MmBackward0>)
    """

    def __init__(self, numbers: int, features: int = 128) -> None:
        super().__init__()
        if numbers < 1:
            raise ValueError(f"an augmentation is at least one number, got augment={numbers}.")
        self.numbers = numbers
        self.features = features
        self.layer_in = nn.Linear(numbers, features, bias=False)
        self.layer_out = nn.Linear(features, features, bias=False)

    def forward(self, augment: Tensor | None, batch: int) -> Tensor:
        """Embed what was done to ``batch`` examples."""
        weight = self.layer_in.weight
        if augment is None:
            augment = torch.zeros(batch, self.numbers, dtype=weight.dtype, device=weight.device)
        if augment.shape[1:] != (self.numbers,):
            raise ValueError(
                f"this network was built for augmentations of {self.numbers} numbers, got shape "
                f"{tuple(augment.shape)}; give augment={augment[0].numel()}."
            )
        out: Tensor = self.layer_out(F.silu(self.layer_in(augment.to(weight.dtype))))
        return out

    def extra_repr(self) -> str:
        """The arguments."""
        return f"numbers={self.numbers}, features={self.features}"
