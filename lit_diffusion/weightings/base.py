"""What a weighting is: how much each noise level counts.

Letters: logsnr = λ, w the weight. One convention holds everywhere: w(λ) weighs the squared error
of the noise in

    L_w(x) = ½ ∫ w(λ) E‖ε̂ − ε‖² dλ

so w says *what* is optimised, whatever the network predicts and whatever the schedule.

If w never rises with λ the loss is the ELBO of data with Gaussian noise added (Kingma & Gao
2023, theorem 1); w = 1 is the ELBO of the data themselves. The family is in `weightings`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from lit_diffusion.registry import plain_arguments

__all__ = ["Weighting"]


class Weighting(nn.Module, ABC):
    """The weight w(λ) > 0 on ‖ε̂ − ε‖² in ½ ∫ w(λ) … dλ.

    A leaf gives `forward`.

    Example:
        >>> class MyWeighting(Weighting):
        ...     def forward(self, logsnr):
        ...         return torch.exp(-logsnr.abs())
        >>> MyWeighting()(torch.tensor([0.0]))
        tensor([1.])
    """

    def __init__(self) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, logsnr: Tensor) -> Tensor:
        """w(λ).

        Args:
            logsnr: λ.

        Shapes:
            logsnr (B,); result (B,), positive, of the same dtype.
        """

    def extra_repr(self) -> str:
        """The arguments, as they would be written."""
        return plain_arguments(self)
