"""What tests share: a tiny trained run, recorded data, and skips for what this machine cannot run."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: a core each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

for _folder in ("training", "helpers"):  # makes `tiny` and `browser` importable
    sys.path.insert(0, str(Path(__file__).parent / _folder))

# A busy machine is not a fault: by default an example that takes longer than 0.2 s is one, and so are slow draws.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

TINY_SETTINGS = (
    "training.validate_every=2",
    "training.batch_size=2",
    "training.segment_length=12",
    "training.positions_per_segment=4",
    "training.warmup_steps=1",
    "training.held_out=0.2",
    "model.width=16",
    "model.num_heads=2",
    "model.encoder_layers=2",
    "model.decoder_layers=1",
    "model.history_length=4",
    "model.chunk_length=4",
    "model.num_past_actions=0",
    "policy.num_executed=2",
    "policy.sampler.num_denoising_steps=2",
)


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """Fails a test that leaves warnings silenced: later tests of the process look for them."""
    yield
    ours = [logging.getLogger(name) for name in sorted(logging.root.manager.loggerDict) if name.startswith("scd_robot")]
    silent = [logger.name for logger in ours if not logger.isEnabledFor(logging.WARNING)]
    logging.disable(logging.NOTSET)
    for logger in ours:
        if logger.level > logging.WARNING:
            logger.setLevel(logging.NOTSET)
    assert not silent, f"no warnings any more from {silent}"


# With --dist loadfile, the tests of a parameter are kept together in these files, not those of the file.
SPREAD = ("tests/sim_eval/test_contract.py",)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Spreads the longest files over processes; robosuite's ten minutes in one of them would be waited for.

    Files come in the order of `pytest_collection_modifyitems`, not by how many tests they have.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return f"{file}[{test.partition('[')[2]}" if file in SPREAD else file

    return Scheduling(config, log)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks what has `robosuite` in its name, so that `make robosuite` runs it, slow or not."""
    if "robosuite" in item.nodeid:
        item.add_marker("robosuite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that cannot run here: `gpu` without a CUDA device, `sim` without the [sim] extra.

    Of several processes, none is to begin a file that takes minutes when the others have nothing left: those with slow
    tests come first.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)
    missing = [name for name in ("metaworld", "gym_pusht") if find_spec(name) is None]
    if missing:
        no_simulator = pytest.mark.skip(reason=f"{' and '.join(missing)} not installed: pip install -e '.[sim]'")
        for item in items:
            if item.get_closest_marker("sim"):
                item.add_marker(no_simulator)
    on_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if on_gpu:
        import torch

        if not torch.cuda.is_available():
            for item in on_gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    """Runs `scd` and asserts that it refuses as it should."""
    from scd_robot.cli.main import main

    def check(arguments: Sequence[object], *told: str, unchanged: Sequence[Path] = (), at_once: bool = True) -> None:
        """Exit code 2 and one sentence that holds all of `told`; the folders `unchanged` stay as they are.

        Args:
            arguments: of the program.
            told: parts of the sentence.
            unchanged: folders in which no file may appear, vanish or change.
            at_once: nothing but the sentence is on standard error (otherwise it is the end of it).
        """
        before = [folder_contents(folder) for folder in unchanged]
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert [line.startswith("scd: error: ") for line in lines].count(True) == 1, lines
        assert lines[-1].startswith("scd: error: ")
        assert len(lines) == 1 or not at_once, lines
        assert not any("Traceback" in line for line in lines), lines
        for part in told:
            assert part in lines[-1]
        assert [folder_contents(folder) for folder in unchanged] == before

    return check


def folder_contents(folder: Path) -> dict[str, bytes | None]:
    """All files below a folder with their bytes, and its folders."""
    paths = folder.rglob("*") if folder.is_dir() else ()
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(scope="session")
def recordings() -> Path:
    """Folder of recorded datasets: $SCD_ROBOT_DATA, else shared/data beside the checkout."""
    folder = Path(os.environ.get("SCD_ROBOT_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no recorded data at {folder}; set SCD_ROBOT_DATA to the folder that holds it")
    return folder


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Zarr store of a point pushed to a goal, which fits the toy environment; copy it before spoiling it."""
    import dataclasses

    from tiny import tiny_data

    from scd_robot.datasets import ZarrWriter

    data = tiny_data()
    path = tmp_path_factory.mktemp("tiny") / "point.zarr"
    with ZarrWriter(path, dataclasses.replace(data.spec, control_dt=0.05)) as writer:
        for index in range(data.num_episodes):
            writer.append(data.episode(index))
    return path


@pytest.fixture(scope="session")
def tiny_train_options() -> list[str]:
    """Options that make `scd train metaworld_state` take a second."""
    return ["--accelerator", "cpu", "--threads", "1", "--set", *TINY_SETTINGS]


@pytest.fixture(scope="session")
def tiny_run(tiny_store: Path, tiny_train_options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of four steps and two checkpoints on `tiny_store`; copy it before spoiling it."""
    from scd_robot.cli.main import main

    out = tmp_path_factory.mktemp("tiny") / "run"
    options = ["--dataset", str(tiny_store), "--out", str(out), "--max-steps", "4", *tiny_train_options]
    assert main(["train", "metaworld_state", *options]) == 0
    return out


@pytest.fixture(scope="session")
def tiny_instructed_run(
    tiny_store: Path, tiny_train_options: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two steps of a policy of two tasks, "pull" and the toy environment's name, that is shown a goal."""
    import dataclasses

    from scd_robot.cli.main import main
    from scd_robot.datasets import ZarrWriter, open_dataset

    folder, data = tmp_path_factory.mktemp("instructed"), open_dataset(tiny_store)
    stores = {"toy_environment:make_point": folder / "first.zarr", "pull": folder / "second.zarr"}
    for source, store in stores.items():
        with ZarrWriter(store, dataclasses.replace(data.spec, source=source)) as writer:
            for index in range(data.num_episodes):
                writer.append(data.episode(index))
    options = ["--dataset", *map(str, stores.values()), "--out", str(folder / "run"), "--max-steps", "2"]
    told = ["--tasks", "one-hot", "--goals", "position"]
    assert main(["train", "metaworld_state", *options, *told, *tiny_train_options]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def tiny_frames_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Zarr store of the moving square of `frame_models`, at the rate of the toy environment."""
    import dataclasses

    from frame_models import moving_square

    from scd_robot.datasets.convert import write_zarr

    data = moving_square(episodes=6)
    path = tmp_path_factory.mktemp("tiny") / "square.zarr"
    write_zarr(dataclasses.replace(data, spec=dataclasses.replace(data.spec, control_dt=0.05)), path)
    return path


@pytest.fixture(scope="session")
def tiny_frames_run(tiny_frames_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run of two steps of a model of frames on `tiny_frames_store`."""
    from frame_models import frame_experiment

    from scd_robot.datasets import open_dataset
    from scd_robot.training import train

    out = tmp_path_factory.mktemp("tiny") / "frames"
    train(open_dataset(tiny_frames_store), frame_experiment(2), out, accelerator="cpu", progress=False)
    return out
