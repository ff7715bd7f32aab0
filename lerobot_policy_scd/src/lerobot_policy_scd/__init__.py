"""Separable Causal Diffusion as a policy of LeRobot, which imports this package by its name: `--policy.type=scd`."""

from lerobot_policy_scd.configuration_scd import ScdConfig
from lerobot_policy_scd.modeling_scd import ScdPolicy
from lerobot_policy_scd.processor_scd import make_scd_pre_post_processors

__all__ = ["ScdConfig", "ScdPolicy", "make_scd_pre_post_processors"]
