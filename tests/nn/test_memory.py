"""What does not fit into memory is refused in one sentence with the sum, before it is tried."""

from pathlib import Path

import pytest
import torch

from scd_robot.errors import ConfigError
from scd_robot.nn import KVCache, memory, room_for

HUGE = 1 << 50


def cache(history_length: int, batch_size: int = 2) -> KVCache:
    return KVCache.create(
        num_layers=3, batch_size=batch_size, num_heads=4, history_length=history_length, tokens_per_step=5, head_dim=8
    )


def test_a_history_that_does_not_fit_is_told_with_its_sum() -> None:
    told = (
        r"out of memory on cpu: 7680\.0 GB of .* GB free, for the history = 3 layers x 2 rows x 2 \(keys, values\) x "
        r"4 heads x 1000000000 control steps of history x 5 tokens each x 8 numbers x 4 bytes; take fewer rows"
    )
    with pytest.raises(ConfigError, match=told):
        cache(1_000_000_000)


def test_many_copies_of_a_history_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cache(64)
    assert one.select(torch.zeros(3, dtype=torch.int64)).batch_size == 3
    monkeypatch.setattr(memory, "_SMALL", 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    assert one.select(torch.zeros(3, dtype=torch.int64)).batch_size == 3
    with pytest.raises(ConfigError, match=r"2\.5 GB of 0\.0 GB free.* x 10000 rows x "):
        one.select(torch.zeros(10_000, dtype=torch.int64))


def test_what_the_system_refuses_is_told_likewise_and_other_errors_pass() -> None:
    told = r"out of memory on cpu: 0\.0 GB and more, for a tensor; take less"
    with pytest.raises(ConfigError, match=told), room_for(8, "cpu", "for a tensor; take less"):
        torch.empty(HUGE, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="of something else"), room_for(8, "cpu", "for a tensor"):
        raise RuntimeError("of something else")


def test_nobody_looks_for_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    with room_for(1000, "cpu", "little"):
        pass
    with pytest.raises(ConfigError, match=r"1\.0 GB of 0\.0 GB free, much"), room_for(10**9, None, "much"):
        pass


def test_free_memory_is_what_the_machine_and_its_container_have_left(tmp_path: Path) -> None:
    free = memory.free_memory(torch.device("cpu"))
    assert free is None or 1 << 20 < free < 1 << 50
    assert memory.free_memory(torch.device("meta")) is None
    assert memory._of_container(tmp_path) is None
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\nfile 200\nfile_mapped 10\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert memory._of_container(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._of_container(tmp_path) is None
