"""Checks of the laws that every plug-in must obey, for those of this library and your own.

    from lit_diffusion.testing import check_schedule
    def test_mine():
        check_schedule(MySchedule())

Each function states the contract of its family as code. It raises `AssertionError` with a message
that names the violated law and has the numbers. The tests of this library run them on every
registered plug-in.
"""

from lit_diffusion.testing.decoders import check_decoder
from lit_diffusion.testing.laws import check_plugin
from lit_diffusion.testing.networks import check_network
from lit_diffusion.testing.predictions import check_prediction
from lit_diffusion.testing.samplers import check_sampler
from lit_diffusion.testing.schedules import check_schedule
from lit_diffusion.testing.weightings import check_weighting

__all__ = [
    "check_decoder",
    "check_network",
    "check_plugin",
    "check_prediction",
    "check_sampler",
    "check_schedule",
    "check_weighting",
]
