"""Large tensors are asked for only where there is room: a system without memory left ends programs without a word."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from scd_robot.errors import ConfigError

__all__ = ["free_memory", "room_for"]

_SMALL = 1 << 28  # bytes; for less nobody looks how much is free

_CPU_REFUSALS = ("DefaultCPUAllocator", "not enough memory", "can't allocate memory")


@contextmanager
def room_for(num_bytes: int, device: torch.device | str | None, told: str) -> Iterator[None]:
    """Refuses what does not fit into memory, before it is tried and where it is tried in vain.

    Args:
        num_bytes: that the block needs at least.
        device: torch's, where; None = the CPU.
        told: what takes them, with the sum, and what to do: "... = 3 rows x 5 numbers x 4 bytes; take fewer rows".

    Raises:
        ConfigError: there is no room.
    """
    place = torch.device("cpu" if device is None else device)
    free = free_memory(place) if num_bytes >= _SMALL else None
    if free is not None and num_bytes > free:
        raise ConfigError(f"out of memory on {place}: {num_bytes / 1e9:.1f} GB of {free / 1e9:.1f} GB free, {told}")
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and not any(words in str(error) for words in _CPU_REFUSALS):
            raise
        raise ConfigError(f"out of memory on {place}: {num_bytes / 1e9:.1f} GB and more, {told}") from error


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be asked for without anything being thrown out; None where the system does not tell."""
    if device.type == "cuda":
        held_ready = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held_ready
    if device.type != "cpu":
        return None
    found = [room for room in (_of_machine(), _of_container()) if room is not None]
    return min(found, default=None)


def _of_machine() -> int | None:
    """Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None


def _of_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """What a control group (version 2) has left; files that it read are in its use and can go."""
    try:
        most, used = ((folder / f"memory.{name}").read_text(encoding="ascii").strip() for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    files = sum(int(line.split()[1]) for line in lines if line.startswith("file "))
    return None if most == "max" else max(0, int(most) - int(used) + files)
