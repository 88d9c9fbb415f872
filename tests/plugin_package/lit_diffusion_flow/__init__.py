"""Rectified flow as in Stable Diffusion 3: one noise schedule, one weighting."""

from lit_diffusion_flow.mode_schedule import ModeSchedule
from lit_diffusion_flow.rectified_flow_weighting import RectifiedFlowWeighting

__all__ = ["ModeSchedule", "RectifiedFlowWeighting"]
