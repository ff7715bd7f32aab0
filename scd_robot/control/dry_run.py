"""A robot that is watched and not moved.

Shapes: Da action width.
"""

from dataclasses import dataclass, field

from scd_robot.control.interfaces import Command, Robot, Sample

__all__ = ["DryRun"]


@dataclass
class DryRun:
    """Passes a robot's samples on, and nothing to it; the loop and its flight records are as if it followed.

    Attributes:
        robot: that is watched.
        last: (Da,) the last command that was kept from it.
        kept: so many were.
    """

    robot: Robot
    last: Command | None = field(default=None, init=False)
    kept: int = field(default=0, init=False)

    def observe(self) -> Sample:
        """The robot's sample."""
        return self.robot.observe()

    def send(self, command: Command) -> None:
        """Keeps the command."""
        self.last = command
        self.kept += 1

    def hold(self) -> None:
        """Nothing."""
