"""torch-export and aoti: the same graphs by torch, and never without a word of trust."""

import shutil

import pytest
from small_policies import small_policy

from scd_robot.errors import CheckpointError, ConfigError, OutputError
from scd_robot.export import OnnxPolicy, load_exported
from scd_robot.export.write import export_policy
from scd_robot.policies import ScdPolicy


def test_torch_export_follows_the_policy_and_needs_trust(tmp_path, capsys) -> None:
    folder = tmp_path / "out"
    report = export_policy(small_policy({"max_delay_steps": 2}), folder, "torch-export")
    assert "comparing" in capsys.readouterr().err
    assert report["good"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("decoder_step.pt2", "encoder_step.pt2", "manifest.json", "parity.json", "plan.pt2"),
    ]
    with pytest.raises(ConfigError, match=r"may be unpickled.*say that you trust them \(--trust, or trust=True\)"):
        load_exported(folder)
    with pytest.raises(ConfigError, match="of kind torch-export, not ONNX"):
        OnnxPolicy(folder)
    assert load_exported(folder, trusted=True).spec.chunk_length == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_aoti_follows_the_policy_and_needs_trust(tmp_path) -> None:
    folder = tmp_path / "out"
    assert export_policy(small_policy({"max_delay_steps": 2}), folder, "aoti")["good"]
    with pytest.raises(ConfigError, match="are native code"):
        load_exported(folder)


def test_the_entangled_architecture_is_refused_with_what_to_do(causal_dit: ScdPolicy, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"entangled architecture cannot be exported.*scd convert-policy"):
        export_policy(causal_dit, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def causal_dit() -> ScdPolicy:
    return small_policy({"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1})


def test_graphs_that_are_not_good_are_not_written_and_what_was_there_stays(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "out"
    policy = small_policy()
    export_policy(policy, folder, "torch-export", tolerance=0)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(OutputError, match="exists already"):
        export_policy(policy, folder, "torch-export")
    with pytest.raises(ConfigError, match=r"the graphs are not good.*nothing was written"):
        export_policy(spoiled(policy, monkeypatch), folder, "torch-export", overwrite=True)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert after == before


def test_only_an_export_is_replaced(tmp_path) -> None:
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    (folder / "mine").touch()
    with pytest.raises(OutputError, match="is not an exported policy and will not be replaced"):
        export_policy(small_policy(), folder, "torch-export", overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["demonstrations", "mine"]


def spoiled(policy: ScdPolicy, monkeypatch: pytest.MonkeyPatch) -> ScdPolicy:
    """A policy whose actions are others than those of its graphs."""
    plan_from = policy.plan_from
    monkeypatch.setattr(policy, "plan_from", lambda given, prefix=None: plan_from(given, prefix) + 0.01)
    return policy


def test_a_file_that_torch_cannot_read_is_named(tmp_path) -> None:
    folder = tmp_path / "out"
    export_policy(small_policy(), folder, "torch-export", tolerance=0)
    assert not (folder / "parity.json").exists()
    (folder / "plan.pt2").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"plan\.pt2 was truncated or changed"):
        load_exported(folder, trusted=True)
