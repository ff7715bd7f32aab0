"""The trained checkpoints in examples/checkpoints act as their README says."""

import re
from pathlib import Path

import pytest

from scd_robot.checkpoint import PUBLISHED_FILES, read_checkpoint
from scd_robot.policies import load_policy
from scd_robot.sim_eval import evaluate
from scd_robot.sim_eval.metrics import wilson_interval

FOLDER = Path(__file__).parents[1] / "examples" / "checkpoints"
ENVIRONMENTS = {"push": "metaworld/push-v3", "cue_reach": "scd_memory/cue-reach:delay=50"}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_what_ships_is_a_published_checkpoint(name):
    checkpoint = read_checkpoint(FOLDER / name)  # of this schema or an earlier one
    assert sorted(path.name for path in (FOLDER / name).iterdir()) == sorted(PUBLISHED_FILES)
    assert sum(path.stat().st_size for path in (FOLDER / name).iterdir()) < 2_000_000
    assert checkpoint.step > 0


def test_nothing_else_ships():
    folders = [path.name for path in FOLDER.iterdir() if path.is_dir()]
    assert sorted(folders) == sorted(ENVIRONMENTS)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_intervals_of_the_table_are_those_of_its_counts(name):
    table = (FOLDER / "README.md").read_text()
    [(successes, episodes, low, high)] = re.findall(rf"\| `{name}` \|.*\| (\d+)/(\d+) \[([\d.]+), ([\d.]+)\]", table)
    told = wilson_interval(int(successes), int(episodes))
    assert [float(low), float(high)] == [round(100 * value, 1) for value in told]


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_they_succeed_in_simulation(name, tmp_path):
    """Of the README's hundred episodes the first ten; a policy that guesses the cue has a chance of 0.0004."""
    evaluation = evaluate(load_policy(FOLDER / name), ENVIRONMENTS[name], episodes=10, num_envs=5)
    assert evaluation.successes >= 8
