"""The soak: what counts as growth of memory, and a short run of the loop."""

import numpy as np
import pytest
from benchmark_jobs import load
from small_policies import small_policy

soak = load("soak")


def test_growth_counts_from_the_end_of_the_first_sixth_on() -> None:
    memory = soak.Memory({"loop": None, "server": None}, 60.0, None)
    memory.seconds = list(range(0, 3601, 5))
    at = np.array(memory.seconds)
    memory.mib = {"loop": np.where(at < 600, at, 600.0).tolist(), "server": (600 + at / 100).tolist()}
    found = memory.growth()
    assert found["loop"]["grown"] == 0, "what happens in the first ten minutes does not count"
    assert found["server"]["first_mib"] == pytest.approx(609, abs=0.1)
    assert found["server"]["last_mib"] == pytest.approx(633, abs=0.1)
    assert found["server"]["grown"] == pytest.approx(24 / 609, abs=1e-3)


def test_a_short_soak_resets_the_loop_lets_plans_fail_and_tells_all_of_it(monkeypatch) -> None:
    monkeypatch.setattr(soak, "policy_with_random_weights", small_policy)
    monkeypatch.setattr(soak, "RESET_S", 0.4)
    monkeypatch.setattr(soak, "SAMPLE_S", 0.1)
    found = soak.soak(2.0 / 60, 50.0, server=False)
    assert found["unsafe"] == []
    assert found["commands"] > 0
    assert found["faults"].keys() <= {"plan_error", "clock_gap", "plan_late", "stale_observation", "delay_too_long"}
    assert len(found["memory"]["mib"]["loop"]) == len(found["memory"]["seconds"]) > 1
    told = soak.tell(found)
    assert f"{found['control_steps']:,} control steps" in told
    assert "memory of the loop: " in told


def test_a_result_that_could_not_be_written_is_refused_before_the_hour(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["soak.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        soak.main()
    assert ended.value.code == 2
    assert "it is a folder; name a file" in capsys.readouterr().err
