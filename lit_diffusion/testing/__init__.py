"""The laws that every plug-in obeys, for those of this library and for yours.

    from lit_diffusion.testing import check_schedule
    def test_mine():
        check_schedule(MySchedule())

Each function states its family's contract as code and raises `AssertionError` with a sentence
that names the law and the numbers. The tests of this library run them over every registered
plug-in.
"""

from lit_diffusion.testing.decoders import check_decoder
from lit_diffusion.testing.laws import check_plugin
from lit_diffusion.testing.predictions import check_prediction
from lit_diffusion.testing.samplers import check_sampler
from lit_diffusion.testing.schedules import check_schedule
from lit_diffusion.testing.weightings import check_weighting

__all__ = [
    "check_decoder",
    "check_plugin",
    "check_prediction",
    "check_sampler",
    "check_schedule",
    "check_weighting",
]
