"""JSON for machines: whole or not at all, and readable by any parser."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from scd_robot.errors import OutputError
from scd_robot.output import check_target, to_plain, write_json, write_text


@dataclass
class Result:
    name: str
    times: tuple[float, ...]


def test_everything_a_result_holds_becomes_plain_json(tmp_path: Path) -> None:
    data = {
        "scalar": np.float32(0.5),
        "flag": np.bool_(True),
        "array": np.arange(4, dtype=np.int64).reshape(2, 2),
        "path": Path("a/b"),
        "result": Result("push", (1.0, 2.0)),
        3: None,
    }
    write_json(tmp_path / "deep" / "er" / "out.json", data)
    assert json.loads((tmp_path / "deep" / "er" / "out.json").read_text()) == {
        "scalar": 0.5,
        "flag": True,
        "array": [[0, 1], [2, 3]],
        "path": "a/b",
        "result": {"name": "push", "times": [1.0, 2.0]},
        "3": None,
    }


def test_numbers_that_json_lacks_become_null() -> None:
    assert to_plain({"a": float("nan"), "b": np.array([np.inf, 1.0]), "c": np.float32("-inf")}) == {
        "a": None,
        "b": [None, 1.0],
        "c": None,
    }


def test_unknown_types_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="set"):
        write_json(tmp_path / "out.json", {"a": {1, 2}})
    assert list(tmp_path.iterdir()) == []


def test_dash_is_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    write_json("-", {"a": 1})
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_full_disk_leaves_the_old_file_and_no_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out.json"
    write_json(target, {"old": True})

    def write_half(self: Path, data: bytes) -> None:
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OutputError, match=r"out\.json.*no space left on device"):
        write_json(target, {"new": True})
    assert json.loads(target.read_text()) == {"old": True}
    assert list(tmp_path.iterdir()) == [target]


def test_impossible_targets_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"file/out\.json': '.*/file' is not a folder"):
        write_json(tmp_path / "file" / "out.json", {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(OutputError, match=r"folder': is a directory"):
        write_json(tmp_path / "folder", {})
    for path, told in (("file/out.json", "file' is not a folder"), ("folder", "it is a folder; name a file")):
        with pytest.raises(OutputError, match=told):
            check_target(tmp_path / path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_target_that_is_tried_is_not_touched(tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.json"
    check_target(target)
    check_target("-")
    assert list(target.parent.iterdir()) == []
    write_text(target, "earlier \u2713")
    check_target(target)
    assert target.read_text(encoding="utf-8") == "earlier \u2713"
    assert list(target.parent.iterdir()) == [target]
