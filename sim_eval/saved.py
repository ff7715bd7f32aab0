"""Evaluations that were written to disk, found again."""

import glob
import json
from pathlib import Path
from typing import Any

from scd_robot.errors import DatasetError
from scd_robot.sim_eval.result import SCHEMA

__all__ = ["find_evaluations", "read_evaluation"]

_RESULT = "result.json"
_EPISODE = {"index", "initial_state_hash", "success", "invalid"}  # what a comparison reads


def find_evaluations(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Folder and document of each evaluation at a path.

    Args:
        path: a result.json, its folder, or a folder of such folders; or, if there is no such path, a pattern of such
            ("runs/a_seed*").

    Returns:
        In the order of their names; empty where there is none.

    Raises:
        DatasetError: one of them cannot be read.
    """
    if not path.exists() and glob.has_magic(str(path)):
        return [found for one in sorted(glob.glob(str(path))) for found in find_evaluations(Path(one))]
    if path.is_file():
        return [(path.parent, read_evaluation(path))]
    if (path / "comparison.json").is_file():
        raise DatasetError(f"{path} is a comparison of several arms; name the folder of one of them in it")
    files = [path / _RESULT] if (path / _RESULT).is_file() else sorted(path.glob(f"*/{_RESULT}"))
    return [(file.parent, read_evaluation(file)) for file in files]


def read_evaluation(file: Path) -> dict[str, Any]:
    """The document of an evaluation.

    Raises:
        DatasetError: no such document, or of another schema.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"cannot read the evaluation {file}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("episodes_detail"), list):
        raise DatasetError(f"{file} is not the result.json of an evaluation by 'scd eval'")
    if document.get("schema") != SCHEMA:
        raise DatasetError(f"{file} has schema {document.get('schema')!r}, this version reads {SCHEMA}; evaluate again")
    lacks = sorted({"env"} - document.keys())
    lacks += sorted({key for one in document["episodes_detail"] for key in _EPISODE - _keys(one)})
    if lacks:
        raise DatasetError(f"{file} lacks {', '.join(lacks)}; it is damaged, evaluate again")
    return document


def _keys(value: Any) -> set[str]:
    return set(value) if isinstance(value, dict) else set()
