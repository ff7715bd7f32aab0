"""What evaluations write, docs/evaluation.md and docs/result.schema.json have the same keys, at every depth."""

import dataclasses
import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from scd_robot.cli.main import main
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.registry import known_environments, make_environment

DOCS = Path(__file__).parents[2] / "docs"
VALIDATOR = Draft202012Validator(json.loads((DOCS / "result.schema.json").read_text()))
FREE = {"versions", "settings", "options", "trained_from", "trained_with", "by_age", "sha256"}  # their keys are data
BY_KIND = {"success", "plan_change"}  # of history.json: their first keys are data
MODULES = {"gymnasium": "gymnasium_tasks", "scd_memory": "memory"}  # called otherwise than their environments
POINT = "toy_environment:make_point"


@pytest.fixture(scope="module")
def written(tiny_run, tiny_store, tiny_instructed_run, tiny_frames_run, tiny_frames_store, tmp_path_factory):
    """By file, documents of that name: of policies that tell little or much, of success and of failure."""
    out = tmp_path_factory.mktemp("documents")
    common = ["--env", POINT, "--episodes", "2", "--num-videos", "0"]
    checkpoint = ["eval", str(tiny_run), *common, "--max-steps", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        from toy_environment import GoToGoal, make_telling

        evaluate(GoToGoal(), make_telling, 3, num_envs=1, out=out / "told", num_videos=1, progress=False)
        diagnosis = ["--diagnose-history", "2", "--dataset", str(tiny_store), "--json", str(out / "told.json")]
        assert main([*checkpoint, *diagnosis, "--out", str(out / "run")]) == 0
        assert main([*checkpoint, "--latency-ms", "0", "100", "--out", str(out / "late")]) == 0
        instructed = ["eval", str(tiny_instructed_run), *common, "--max-steps", "4", "--goal", f"{tiny_store}:0"]
        assert main([*instructed, "--out", str(out / "instructed")]) == 0
        patch.chdir(Path(__file__).parent)  # where toy_policy lies
        named = [
            "eval",
            "toy_policy:GoToGoal",
            *common,
            "--policy-options",
            "seed=1",
            "--policy-python",
            sys.executable,
        ]
        assert main([*named, "--out", str(out / "named")]) == 0
        exported = str(out / "exported")
        assert main(["export", str(tiny_run), "--format", "torch-export", "--out", exported]) == 0
        assert main(["eval", exported, "--trust", *common, "--max-steps", "8", "--out", str(out / "graphs")]) == 0
        imagined = ["eval", str(tiny_run), "--env", "toy_environment:make_seeing", *common[2:], "--max-steps", "4"]
        imagined += ["--imagine", str(tiny_frames_run), "--candidates", "2"]
        assert main([*imagined, "--score", "toy_environment:most_to_the_right", "--out", str(out / "scored")]) == 0
        assert main([*imagined, "--goal-picture", f"{tiny_frames_store}:0", "--out", str(out / "goal")]) == 0
        both = ["--env", POINT, "metaworld/pusch-v3", "--episodes", "2"]
        assert main(["sweep", str(tiny_run), *both, "--out", str(out / "sweep")]) == 2
    found = {name: [json.loads(p.read_text()) for p in sorted(out.rglob(name))] for name in DOCUMENTS}
    lines = [line for path in sorted(out.rglob("episodes.jsonl")) for line in path.read_text().splitlines()]
    return {**found, "episodes.jsonl": [json.loads(line) for line in lines], "told.json": out / "told.json"}


DOCUMENTS = ("result.json", "history.json", "latency.json", "sweep.json")


def documented(name):
    """Rows of the table that follows a file's name: keys, and the keys in braces beside them."""
    text = (DOCS / "evaluation.md").read_text()
    start = re.search(rf"^(## )?`{re.escape(name)}`(, schema \d:?)?$", text, flags=re.MULTILINE)
    assert start, f"docs/evaluation.md has no table of {name}"
    table = re.search(r"^\| key \| value \|\n\|---\|---\|\n((?:\|.*\n)+)", text[start.end() :], flags=re.MULTILINE)
    rows = [row.strip("| ").split(" | ", 1) for row in table[1].splitlines()]
    return [(re.findall(r"`([^`]+)`", keys), in_braces(value)) for keys, value in rows]


def in_braces(cell):
    depth, names = 0, set()
    for token in re.findall(r"[{}]|`[^`]+`", cell):
        if token in "{}":
            depth += 1 if token == "{" else -1
        elif depth:
            names.add(token.strip("`"))
    assert depth == 0, cell
    return names


def below(value, key=""):
    """The names of keys anywhere inside a value."""
    if isinstance(value, list):
        return set().union(*(below(one, key) for one in value))
    if not isinstance(value, dict) or key in FREE:
        return set()
    if key in BY_KIND:
        return set().union(*(below(one) for one in value.values()))
    return set(value).union(*(below(one, name) for name, one in value.items()))


def test_every_environment_stands_in_the_documentation_with_its_options():
    text = (DOCS / "evaluation.md").read_text()
    for prefix in {name.partition("/")[0] for name in known_environments()}:
        [row] = [line for line in text.splitlines() if re.match(rf"\| `{prefix}(/TASK)?` \|", line)]
        module = importlib.import_module(f"scd_robot.sim_eval.{MODULES.get(prefix, prefix)}")
        [options] = [kind for name, kind in vars(module).items() if name.endswith("Options")]
        for field in dataclasses.fields(options):
            assert re.search(rf"`{field.name}\b", row), f"{prefix}: {field.name}"


@pytest.mark.parametrize("name", [*DOCUMENTS, "episodes.jsonl"])
def test_what_is_documented_is_written_and_what_is_written_is_documented(written, name):
    documents, rows = written[name], documented(name)
    top = [key for keys, _ in rows for key in keys]
    assert len(top) == len(set(top))
    assert documents
    for document in documents:
        assert set(document) == set(top)
    for keys, nested in rows:
        if (name, keys) != ("latency.json", ["evaluations"]):  # each a result.json
            assert below([document[key] for document in documents for key in keys], keys[0]) == nested, keys


def test_a_curve_and_a_diagnosis_hold_results(written):
    keys = {key for row, _ in documented("result.json") for key in row}
    [curve] = written["latency.json"]
    assert [set(one) for one in curve["evaluations"]] == [keys, keys]
    told = json.loads(written["told.json"].read_text())
    assert set(told) == keys | {"history"}
    assert [told["history"]] == written["history.json"]


def test_results_are_as_their_schema_says(written):
    Draft202012Validator.check_schema(VALIDATOR.schema)
    for document in written["result.json"]:
        VALIDATOR.validate(document)
    agree(VALIDATOR.schema, written["result.json"], "result")


def agree(schema, values, where):
    """Every key is written somewhere and in the schema; those that are always written are required."""
    if "$ref" in schema:
        schema = VALIDATOR.schema["$defs"][schema["$ref"].removeprefix("#/$defs/")]
    if "properties" in schema:
        objects = [value for value in values if value is not None]
        assert set().union(*objects) == set(schema["properties"]), where
        assert set.intersection(*map(set, objects)) == set(schema.get("required", ())), where
        for key, part in schema["properties"].items():
            agree(part, [one[key] for one in objects if key in one], f"{where}.{key}")
    if isinstance(schema.get("items"), dict) and schema["items"].get("type") != "number":
        agree(schema["items"], [item for value in values for item in value], f"{where}[]")


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": 2},
        {"success_rate": 1.5},
        {"interval": [0.5]},
        {"episodes": "50"},
        {"act_ms": {"p50": 1.0}},
        {"episodes_detail": [{"index": 0}]},
        {"provenance": {"created": None, "commit": None, "machine": {}, "policy": {}}},
    ],
)
def test_the_schema_refuses_what_is_no_result(written, damage):
    assert not VALIDATOR.is_valid(written["result.json"][0] | damage)


@pytest.mark.sim
def test_the_environment_of_the_documentation_is_one(tmp_path, monkeypatch):
    pytest.importorskip("gymnasium")
    section = (DOCS / "evaluation.md").read_text().partition("## A new environment")[2]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    (tmp_path / "my_env.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    environment = make_environment("my_env:Reacher")
    starts = [(environment.reset(seed)["state"].tolist(), environment.state_hash()) for seed in (1, 2, 1)]
    assert starts[0] == starts[2] != starts[1]
    environment.close()

    class Still:
        def reset(self):
            pass

        def act(self, observation):
            return np.zeros((1, 2), np.float32)

    result = evaluate(Still(), "my_env:Reacher", 2, progress=False)
    assert [episode.reason for episode in result.episodes_detail] == ["time limit"] * 2
    assert [episode.steps for episode in result.episodes_detail] == [50, 50]
