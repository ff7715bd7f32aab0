"""Closed-loop evaluation in simulation: `scd_robot.sim_eval`. START HERE: `rollout.evaluate`.

This folder is installed inside `scd_robot`; Python started in the checkout also finds it under the bare name
`sim_eval`, under which it does not work.
"""

if __name__ == "sim_eval":
    raise ModuleNotFoundError("no package 'sim_eval' is installed; import 'scd_robot.sim_eval'", name="sim_eval")

from scd_robot.sim_eval.metrics import wilson_interval
from scd_robot.sim_eval.policy_adapter import PolicyError, check_policy_spec
from scd_robot.sim_eval.registry import known_environments, make_environment
from scd_robot.sim_eval.rendering import close_renderer, render_frame, select_gl_backend
from scd_robot.sim_eval.result import EpisodeRecord, EvaluationResult, VideoRecord
from scd_robot.sim_eval.rollout import evaluate
from scd_robot.sim_eval.workers import EnvironmentSource, EnvironmentWorker, WorkerCrashError, start_workers

__all__ = [
    "EnvironmentSource",
    "EnvironmentWorker",
    "EpisodeRecord",
    "EvaluationResult",
    "PolicyError",
    "VideoRecord",
    "WorkerCrashError",
    "check_policy_spec",
    "close_renderer",
    "evaluate",
    "known_environments",
    "make_environment",
    "render_frame",
    "select_gl_backend",
    "start_workers",
    "wilson_interval",
]
