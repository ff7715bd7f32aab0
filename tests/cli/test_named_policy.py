"""Policies by dotted name in `scd eval`, `sweep` and `compare`, with the example of docs/evaluation.md."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from scd_robot.cli.main import main

DOCUMENT = Path(__file__).parents[2] / "docs" / "evaluation.md"
NAME = "toy_policy:GoToGoal"


@pytest.fixture
def named(point, monkeypatch):
    """In the folder of the toy policies; `point` is the environment's name."""
    monkeypatch.chdir(Path(__file__).parents[1] / "sim_eval")
    return ["--env", point, "--episodes", "2"]


@pytest.mark.sim
def test_the_example_of_the_documentation_reaches_its_goal(tmp_path, monkeypatch):
    section = DOCUMENT.read_text().partition("## Policies of your own")[2].partition("\n## ")[0]
    [code] = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    [command] = re.findall(r"```bash\nscd (.*?)\n```", section)
    (tmp_path / "my_policies.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    assert main([*shlex.split(command), "--episodes", "2", "--max-steps", "150", "--num-videos", "0"]) == 0
    result = json.loads((tmp_path / "runs" / "towards" / "result.json").read_text())
    assert result["successes"] == 2
    assert result["provenance"]["policy"]["module"]["options"] == {"key": "goal", "gain": 20}


def test_a_sweep_evaluates_it_and_finds_it_again(named, tmp_path, refused, monkeypatch):
    arguments = ["sweep", NAME, *named, "--out", str(tmp_path), "--seeds", "0", "1", "--policy-options", "gain=4"]
    assert main(arguments) == 0
    table = json.loads((tmp_path / "sweep.json").read_text())
    assert [(row["seed"], row["successes"], row["policy"]) for row in table["evaluations"]] == [
        (0, 2, NAME),
        (1, 2, NAME),
    ]
    monkeypatch.setattr("scd_robot.sim_eval.named_policy.make_named_policy", lambda *_, **__: pytest.fail("again"))
    assert main(arguments) == 0
    refused([*arguments[:-1], "gain=5"], "holds another evaluation", "'gain': 4", unchanged=[tmp_path])


def test_it_is_compared_with_an_evaluation_that_is_there(named, tmp_path):
    out = tmp_path / "still"
    assert (
        main(["eval", "toy_policy:OneByOne", *named, "--out", str(out), "--num-videos", "0", "--max-steps", "40"]) == 0
    )
    arguments = ["compare", NAME, str(out), *named, "--json", str(tmp_path / "comparison.json")]
    assert main([*arguments, "--policy-python", sys.executable]) == 0
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert (comparison["a"]["successes"], comparison["b"]["successes"]) == (2, 0)


def test_options_for_the_other_kind_are_refused(named, tiny_run, refused):
    refused(["eval", str(tiny_run), *named, "--policy-options", "gain=1"], "are for policies by dotted name")
    refused(["eval", NAME, *named, "--num-executed", "2"], "--num-executed is for checkpoints", "--policy-options")
    refused(["eval", NAME, *named, "--guidance-scale", "0"], "--guidance-scale is for checkpoints")
    refused(["eval", NAME, *named, "--diagnose-history", "2"], "--diagnose-history is for checkpoints")
    refused(["compare", NAME, str(tiny_run)], "is a policy to be evaluated; give --env")
