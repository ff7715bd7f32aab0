"""Recording of demonstrations by scripted experts."""

from scd_robot.recording.record import record_demonstrations

__all__ = ["record_demonstrations"]
