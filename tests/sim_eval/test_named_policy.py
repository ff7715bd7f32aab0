"""Policies by dotted name, here and under another Python: the same episodes, and told where they came from."""

import hashlib
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from scd_robot.dotted import parse_options
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.sim_eval import PolicyError, evaluate
from scd_robot.sim_eval.named_policy import make_named_policy
from scd_robot.sim_eval.policy_process import PolicyProcess
from scd_robot.sim_eval.policy_server import pack, unpack

FOLDER = Path(__file__).parent
NAME = "toy_policy:GoToGoal"


@pytest.fixture(autouse=True)
def in_folder(toy, monkeypatch):
    """Where the module of the policies lies."""
    monkeypatch.chdir(FOLDER)
    return toy


def make(name=NAME, python=None, **options):
    return make_named_policy(name, options, "toy_environment:make_point", python=python)


@pytest.mark.parametrize("python", [None, sys.executable])
def test_it_is_given_options_and_the_environment_and_tells_what_it_is(python):
    policy = make(python=python, gain=4.0, seed=3)
    result = evaluate(policy, "toy_environment:make_point", 3, num_envs=2, progress=False)
    assert result.successes == 3
    told = result.provenance["policy"]
    assert told["type"] == NAME
    assert told["weights_sha256"] == f"{3:064x}"
    assert told["settings"] == {"gain": 4.0, "seed": 3}
    assert told["module"]["options"] == told["settings"]
    assert told["module"]["sha256"] == hashlib.sha256((FOLDER / "toy_policy.py").read_bytes()).hexdigest()
    assert (told["module"]["name"], told["module"]["file"]) == (NAME, "toy_policy.py")
    assert told.get("python") == python


def test_another_python_acts_and_is_measured_the_same():
    results = [
        evaluate(make(python=python), "toy_environment:make_point", 4, num_envs=3, progress=False)
        for python in (None, sys.executable)
    ]
    assert results[0].episodes_detail == results[1].episodes_detail
    assert results[0].timings_ms["plan"] == results[1].timings_ms["plan"]
    for index, actions in results[0].actions.items():
        np.testing.assert_array_equal(actions, results[1].actions[index])


@pytest.mark.parametrize("name", ["toy_policy:OneByOne", "toy_policy:Whole"])
def test_a_policy_without_rows_runs_in_one_environment_there_too(name):
    for python in (None, sys.executable):
        assert evaluate(make(name, python), "toy_environment:make_point", 2, progress=False).num_envs == 1
        with pytest.raises(ConfigError, match="takes no rows"):
            evaluate(make(name, python), "toy_environment:make_point", 2, num_envs=2, progress=False)


def test_another_python_needs_neither_this_package_nor_its_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    (tmp_path / "numpy.py").write_text("raise RuntimeError('the wrong one')")
    (tmp_path / "mine.py").write_text(
        "import sys\n"
        "class Policy:\n"
        "    def reset(self): pass\n"
        "    def act(self, observation): return observation['position']\n"
        "policy = Policy()\n"
        "policy.provenance = {'seen': [name for name in sys.modules if name.startswith('scd_robot.')]}\n"
        "make = lambda: policy\n"
    )
    with PolicyProcess(sys.executable, "mine:make", folder=tmp_path) as policy:
        assert set(policy.provenance["seen"]) == {"scd_robot.dotted", "scd_robot.errors", "scd_robot.types"}
        policy.reset(episodes=[0])
        np.testing.assert_array_equal(policy.act({"position": np.ones((1, 2))}), np.ones((1, 2)))


def test_its_process_ends_with_it():
    policy = PolicyProcess(sys.executable, "toy_policy:OneByOne")
    process = policy._process
    del policy
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() == 0


@pytest.mark.parametrize(
    ("how", "told"), [("raise", "ZeroDivisionError at toy_policy.py:.*: no plan"), ("die", "died with code 7")]
)
def test_what_goes_wrong_there_is_told(how, told):
    policy = make("toy_policy:Failing", sys.executable, how=how)
    with pytest.raises(PolicyError, match=told):
        evaluate(policy, "toy_environment:make_point", 1, progress=False)


@pytest.mark.parametrize(
    ("name", "options", "error", "told"),
    [
        ("toy_policies:Make", {}, ConfigError, "cannot import toy_policies for the policy"),
        ("toy_policy:GoToGaol", {}, UnknownNameError, "did you mean 'GoToGoal'"),
        ("toy_policy:GoToGoal", {"gian": 1}, UnknownNameError, "did you mean 'gain'"),
        ("toy_policy:np", {}, ConfigError, "must be a callable or a class, got module"),
        ("toy_policy:make_nothing", {}, ConfigError, "with reset and act; dict has no reset"),
        ("toy_policy:Sealed", {}, ConfigError, "lets its attribute `provenance` be set"),
    ],
)
def test_what_cannot_be_made_is_refused(name, options, error, told):
    with pytest.raises(error, match=told):
        make(name, **options)


def test_what_cannot_be_made_there_is_told():
    with pytest.raises(ConfigError, match=f"did you mean 'gain'.*in a process of {sys.executable}"):
        make(python=sys.executable, gian=1)


def test_an_interpreter_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="cannot start /no/such/python"):
        PolicyProcess("/no/such/python", NAME)


def test_options_are_json_or_text():
    typed = parse_options(["a=1", "b=0.5", "c=[4,2]", "d=true", "e=runs/a", "f=", 'g="1"', "h=x=y"])
    assert typed == {"a": 1, "b": 0.5, "c": [4, 2], "d": True, "e": "runs/a", "f": "", "g": "1", "h": "x=y"}
    for wrong, told in ((["a"], "KEY=VALUE"), (["a b=1"], "KEY=VALUE"), (["a=1", "a=2"], "given twice")):
        with pytest.raises(ConfigError, match=told):
            parse_options(wrong)


# ----- messages


def test_messages_carry_numbers_exactly():
    arrays = {"x": np.arange(6, dtype=np.float64).reshape(2, 3)[:, ::2], "y": np.zeros((0, 4), np.uint8)}
    arrays["z"] = np.array(True)
    message, found = unpack(pack({"call": "act", "rows": [1]}, arrays))
    assert message == {"call": "act", "rows": [1]}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_objects_never_travel():
    with pytest.raises(ConfigError, match="'x' must hold numbers"):
        pack({}, {"x": np.array([print])})
    data = pack({}, {"x": np.zeros(1)})
    with pytest.raises(ConfigError, match="damaged"):
        unpack(data.replace(b"<f8", b"|O8"))


@pytest.mark.parametrize("spoil", [lambda d: d[:-1], lambda d: d + b"x", lambda d: d[:3], lambda d: os.urandom(40)])
def test_damaged_messages_are_refused(spoil):
    with pytest.raises(ConfigError, match="damaged"):
        unpack(spoil(pack({"call": "act"}, {"x": np.zeros(3)})))
