"""The base class of weightings: how much each noise level counts.

Letters: logsnr = λ, w the weight. One convention holds everywhere: w(λ) is the weight on the
squared error of the noise in

    L_w(x) = ½ ∫ w(λ) E‖ε̂ − ε‖² dλ

so w defines *what* is optimised, whatever the network predicts and whatever the schedule.

If w never increases with λ, the loss is the ELBO of the data with Gaussian noise added (Kingma &
Gao 2023, theorem 1); w = 1 is the ELBO of the data themselves. The package `weightings` lists them
all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from lit_diffusion.exact import ExactModule
from lit_diffusion.registry import plain_arguments

__all__ = ["Weighting"]


class Weighting(ExactModule, ABC):
    """The weight w(λ) > 0 on ‖ε̂ − ε‖² in ½ ∫ w(λ) … dλ.

    A subclass defines `forward`.

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
        """The arguments, as in the constructor call."""
        return plain_arguments(self)
