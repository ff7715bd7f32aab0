"""What every reader takes and gives; the readers themselves are listed in `open.py`."""

from collections.abc import Sequence
from dataclasses import dataclass

from scd_robot.errors import ConfigError

__all__ = ["ReadOptions"]


@dataclass(frozen=True)
class ReadOptions:
    """What to read of a recording, where its file leaves a choice.

    Attributes:
        keys: observation keys; None = all.
        action: array that holds the labels; None = the format's usual one.
        control_dt: seconds between control steps; None = what the file says.
        mask: only episodes in this list of the file (robomimic's mask/NAME); None = all.
        fill_missing: take Zarr chunks that are not there for fill values, as some writers mean it.
        cache: folder that keeps what was read from a remote store; None = nothing is kept.
        check: refuse NaN and infinite values, and episodes of one step.
    """

    keys: Sequence[str] | None = None
    action: str | None = None
    control_dt: float | None = None
    mask: str | None = None
    fill_missing: bool = False
    cache: str | None = None
    check: bool = True

    def __post_init__(self) -> None:
        if self.control_dt is not None and not 0 < self.control_dt < float("inf"):
            raise ConfigError(f"control_dt must be a positive time [s], got {self.control_dt}")
        if self.keys is not None and not self.keys:
            raise ConfigError("keys must name at least one observation; leave it out for all")
