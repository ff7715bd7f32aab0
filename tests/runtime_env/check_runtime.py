"""Checks scd_robot_runtime in an environment that holds nothing else: python check_runtime.py EXAMPLE ADDRESS.

EXAMPLE is what write_example.py wrote, ADDRESS that of a server of its checkpoint. A plain script without pytest, which
the environment does not have. tests/test_runtime.py runs it.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import pkgutil
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from packaging.requirements import Requirement  # which onnxruntime needs

import scd_robot_runtime
from scd_robot_runtime.control import ControlLoop, Limits, LoopConfig, Sample, VirtualClock
from scd_robot_runtime.control.inspection import InspectedRobot
from scd_robot_runtime.control.planner import VirtualPlanner
from scd_robot_runtime.control.rehearsal import KINDS, LINK_KINDS, Incident, rehearse
from scd_robot_runtime.errors import MissingDependencyError
from scd_robot_runtime.export import OnnxPolicy, load_exported
from scd_robot_runtime.serve import PolicyClient, RemotePolicy
from scd_robot_runtime.serve.rehearsal import behind_a_server

NAME = "scd_robot_runtime"
NEEDS = {"msgpack", "numpy", "onnxruntime", "websockets"}
ABSENT = ("scd_robot", "torch", "lightning", "zarr", "h5py", "mujoco", "tyro", "scipy", "onnx", "safetensors")


def needs_of(name: str) -> set[str]:
    """What a distribution requires, without its extras."""
    needs = map(Requirement, importlib.metadata.requires(name) or [])
    wanted = {need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})}
    return {need.lower().replace("-", "_") for need in wanted}


def check_packages() -> None:
    """Nothing is installed but what the package needs, what that needs, and what a new environment has."""
    assert needs_of(NAME) == NEEDS, needs_of(NAME)
    wanted = {NAME}
    while new := {need for name in wanted for need in needs_of(name)} - wanted:
        wanted |= new
    found = {one.metadata["Name"].lower().replace("-", "_") for one in importlib.metadata.distributions()}
    assert found - {"pip", "setuptools"} == wanted, f"installed are {sorted(found)}, expected {sorted(wanted)}"
    assert not [name for name in ABSENT if importlib.util.find_spec(name)]


def check_modules() -> None:
    """All modules import, and have what they say."""
    names = [module.name for module in pkgutil.walk_packages(scd_robot_runtime.__path__, f"{NAME}.")]
    assert {f"{NAME}.control.loop", f"{NAME}.export.policy", f"{NAME}.serve.client"} <= set(names)
    for name in names:
        module = importlib.import_module(name)
        missing = [one for one in getattr(module, "__all__", []) if not hasattr(module, one)]
        assert not missing, f"{name} lacks {missing}"
    assert scd_robot_runtime.__version__ == importlib.metadata.version(NAME)


def check_rehearsal() -> None:
    """The loop over a scripted robot in virtual time, through every kind of fault."""
    limits = Limits((-1.0, -1.0), (1.0, 1.0), (2.0, 1.0), (20.0, 5.0), (None, None))
    quiet = rehearse([], LoopConfig(servo_steps=2), limits, steps=60)
    assert not quiet.violations, quiet.violations
    assert quiet.commands > 100, quiet.commands
    assert not quiet.report.faults, quiet.report.faults
    for kind in KINDS + LINK_KINDS:
        connect = behind_a_server if kind in LINK_KINDS else None
        found = rehearse([Incident(kind, 20, 3)], LoopConfig(), limits, steps=60, connect=connect)
        assert not found.violations, (kind, found.violations)
        assert found.raised is None, (kind, found.raised)


class ScriptedRobot:
    """A hand that is at once where it was sent, and a camera that shows noise."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock, self.at, self.rng = clock, np.zeros(6), np.random.default_rng(0)

    def observe(self) -> Sample:
        pose = np.array([*self.at[:3], 0, 0, 0, 1], np.float32)
        eye = self.rng.integers(0, 256, (16, 24, 3), np.uint8)
        return Sample({"pose": pose, "eye": eye}, self.clock.now(), pose=self.at.copy())

    def send(self, command: np.ndarray) -> None:
        self.at = np.array(command)

    def hold(self) -> None:
        pass


def check_loop(exported: Path) -> None:
    """The loop, driven by an exported policy that plans with committed actions, in virtual time."""
    clock, policy = VirtualClock(), OnnxPolicy(exported)
    limits = Limits((-2.0,) * 6, (2.0,) * 6, (2.0,) * 6, (20.0,) * 6, (None,) * 6)
    port = InspectedRobot(ScriptedRobot(clock), limits, policy.spec.control_dt / 2, clock)
    planner = VirtualPlanner(policy, clock, lambda: 1.5 * policy.spec.control_dt)
    loop = ControlLoop(port, policy, limits, LoopConfig(servo_steps=2), clock=clock, planner=planner)
    report = loop.run(max_steps=80)
    assert not port.violations, port.violations
    assert port.commands > 100, port.commands
    assert report.plans["followed"] > 10, report.plans
    assert not {"encoder_error", "plan_error", "bad_observation"} & report.faults.keys(), report.faults
    assert np.abs(port.robot.at).max() > 0.1  # it went somewhere


def check_actions(policy: OnnxPolicy | RemotePolicy, expected: dict[str, np.ndarray]) -> None:
    """Two rows act as the policy did in the environment of scd_robot, up to rounding."""
    policy.reset(episodes=expected["episodes"].tolist())
    for step, actions in enumerate(expected["actions"]):
        seen = {key: expected[key][step] for key in ("pose", "eye")}
        found = policy.act(seen, expected["executed"][step - 1] if step else None)
        np.testing.assert_allclose(found, actions, rtol=0, atol=1e-4, err_msg=f"{type(policy).__name__}, step {step}")


def check_client(address: str, expected: dict[str, np.ndarray]) -> None:
    """One connection, asked directly, gives the first plan of the first row."""
    with PolicyClient(address) as client:
        seen = {key: expected[key][0, 0] for key in ("pose", "eye")}
        chunk = client.infer(seen, reset=True, episode=int(expected["episodes"][0]), step=0)["actions"]
        assert chunk.shape == (client.metadata["action_horizon"], 6), chunk.shape
        np.testing.assert_allclose(chunk[0], expected["actions"][0, 0], rtol=0, atol=1e-4)


def check_refusals(exported: Path) -> None:
    """Graphs that need torch are refused with what to do."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(exported, Path(folder, "copy")))
        document = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(json.dumps({**document, "kind": "aoti"}))
        told = ""
        try:
            load_exported(copy, trusted=True)
        except MissingDependencyError as error:
            told = str(error)
        assert "need torch and all of scd_robot" in told, told or "native code was loaded without torch"


def main(example: Path, address: str) -> None:
    """All checks; the first one that fails raises."""
    logging.disable()
    with np.load(example / "expected.npz") as file:
        expected = dict(file)
    check_packages()
    check_modules()
    check_rehearsal()
    check_loop(example / "exported")
    check_actions(OnnxPolicy(example / "exported"), expected)
    check_refusals(example / "exported")
    check_client(address, expected)
    remote = RemotePolicy(address)
    check_actions(remote, expected)
    remote.close()
    loaded = sorted({name.partition(".")[0] for name in sys.modules} & set(ABSENT))
    assert not loaded, loaded
    print(f"{NAME} {scd_robot_runtime.__version__} does what scd_robot does")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
