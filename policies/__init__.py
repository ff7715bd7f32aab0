"""Policies: objects that turn observations into actions and hide their caches and normalisation."""

if __name__ == "policies":
    raise ModuleNotFoundError("no package 'policies' is installed; import 'scd_robot.policies'", name="policies")

from scd_robot.policies.causal_dit import CausalDitPolicy
from scd_robot.policies.imagination import Imagination, load_imagination
from scd_robot.policies.loading import load_policy
from scd_robot.policies.scd import ScdPolicy

__all__ = ["CausalDitPolicy", "Imagination", "ScdPolicy", "load_imagination", "load_policy"]
