"""Flow matching: paths and flow times, solvers, guidance. Knows nothing of networks."""

from scd_robot.diffusion.guidance import corrupt, guide
from scd_robot.diffusion.path import FlowTimeConfig, PathSample, interpolate, sample_flow_time
from scd_robot.diffusion.sampler import Sample, SamplerConfig, sample

__all__ = [
    "FlowTimeConfig",
    "PathSample",
    "Sample",
    "SamplerConfig",
    "corrupt",
    "guide",
    "interpolate",
    "sample",
    "sample_flow_time",
]
