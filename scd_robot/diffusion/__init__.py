"""Flow matching: paths and flow times, solvers, few-step objectives, guidance. Knows nothing of networks."""

from scd_robot.diffusion.chunk_guidance import (
    Jacobian,
    TowardsActions,
    guidance_gain,
    guided_velocity,
    overlap_weights,
)
from scd_robot.diffusion.few_steps import MIP_TIME, mean_flow, sample_mip_time, sample_step_end, shortcut
from scd_robot.diffusion.guidance import corrupt, guide
from scd_robot.diffusion.path import FlowTimeConfig, PathSample, interpolate, sample_flow_time
from scd_robot.diffusion.sampler import Sample, SamplerConfig, sample

__all__ = [
    "MIP_TIME",
    "FlowTimeConfig",
    "Jacobian",
    "PathSample",
    "Sample",
    "SamplerConfig",
    "TowardsActions",
    "corrupt",
    "guidance_gain",
    "guide",
    "guided_velocity",
    "interpolate",
    "mean_flow",
    "overlap_weights",
    "sample",
    "sample_flow_time",
    "sample_mip_time",
    "sample_step_end",
    "shortcut",
]
