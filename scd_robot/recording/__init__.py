"""Recording of demonstrations by scripted experts, observations for recorded states, and open-loop replays."""

from scd_robot.recording.record import record_demonstrations
from scd_robot.recording.replay import replay_dataset
from scd_robot.recording.robosuite_states import observe_states, write_observations

__all__ = ["observe_states", "record_demonstrations", "replay_dataset", "write_observations"]
