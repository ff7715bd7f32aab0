"""Training runs: resume after a kill, several devices, checkpoints, fine-tuning, errors."""

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors.torch import load_file
from tiny import tiny_data, tiny_experiment

from scd_robot.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from scd_robot.config import to_json
from scd_robot.datasets.combine import mix_datasets
from scd_robot.errors import CheckpointError, ConfigError, DatasetError, OutputError, ShapeError, TrainingDivergedError
from scd_robot.normalization import Normalizer
from scd_robot.policies import load_policy
from scd_robot.presets import resolve
from scd_robot.training import Ema, ScdLightningModule, train
from scd_robot.training.module import learning_rate_factor

TINY = Path(__file__).with_name("tiny.py")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(out: Path, experiment=None, **options):
    return train(tiny_data(), experiment or tiny_experiment(), out, accelerator="cpu", progress=False, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(find_checkpoint(out) / "model.safetensors")


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    run(tmp_path / "whole", tiny_experiment(9))
    killed = tmp_path / "killed"
    # The process kills itself with SIGKILL in the middle of an epoch, after two checkpoints.
    code = (
        "import os, signal, sys; sys.path.insert(0, sys.argv[1]); sys.argv[1:] = sys.argv[2:]; import tiny\n"
        "from scd_robot.training.module import ScdLightningModule as M\n"
        "step = M.training_step\n"
        "def dying(self, batch, i):\n"
        "    if self.trainer.global_step == 7: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return step(self, batch, i)\n"
        "M.training_step = dying\n"
        "tiny.main()\n"
    )
    died = subprocess.run([sys.executable, "-c", code, str(TINY.parent), str(killed), "9"], check=False)
    assert died.returncode == -signal.SIGKILL
    assert [p.name for p in list_checkpoints(killed)] == ["step_00000003", "step_00000006"]
    run(killed, tiny_experiment(9), resume=True)
    assert_same(weights(tmp_path / "whole"), weights(killed))
    raw = [
        torch.load(find_checkpoint(tmp_path / name) / "resume" / "training_state.ckpt", weights_only=True)
        for name in ("whole", "killed")
    ]
    assert_same(raw[0]["state_dict"], raw[1]["state_dict"])
    for first, second in zip(
        raw[0]["optimizer_states"][0]["state"].values(), raw[1]["optimizer_states"][0]["state"].values(), strict=True
    ):
        assert torch.equal(first["exp_avg_sq"], second["exp_avg_sq"])
    assert raw[0]["ema"]["num_updates"] == raw[1]["ema"]["num_updates"] == 9


def run_processes(*runs: list[str]) -> None:
    """Trains one after the other in two processes; each run as the arguments of `tiny.py`."""
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    arguments = [argument for one in runs for argument in ("--", *one)][1:]
    subprocess.run([sys.executable, str(TINY), *arguments], check=True, env=environment, timeout=1800)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all runs that two processes train from their beginning: they begin once, which takes longest."""
    folder = tmp_path_factory.mktemp("by_two")
    runs = [[f"{kind}-{strategy}", "4", "--strategy", strategy, f"--{kind}"] for kind in FRAMES for strategy in BOTH]
    runs += [[strategy, "6", "--strategy", strategy] for strategy in BOTH]
    runs += [["stopped", "6", "--strategy", "fsdp", "--stop-after", "3"]]
    run_processes(*([str(folder / name), *options] for name, *options in runs))
    return folder


BOTH = ("ddp", "fsdp")
FRAMES = {"frames": "frame_head.", "own-frames": "action."}  # and what begins the names of some weights


@pytest.mark.parametrize("strategy", BOTH)
def test_two_processes_train_like_one_with_the_same_global_batch(by_two: Path, tmp_path: Path, strategy: str) -> None:
    run(tmp_path / "one")
    one, two = weights(tmp_path / "one"), weights(by_two / strategy)
    torch.manual_seed(0)
    start = dict(ScdLightningModule(tiny_experiment(), Normalizer({}, {})).model.named_parameters())
    assert one.keys() == two.keys()
    for name in one:
        moved = (one[name] - start[name].detach()).abs().max()
        torch.testing.assert_close(one[name], two[name], atol=float(1e-4 * moved + 1e-6), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FRAMES)
def test_models_of_frames_train_alike_sharded_and_copied(by_two: Path, kind: str) -> None:
    """Beside actions; and where the devices imagine frames of their own, in some steps one of them alone."""
    copied, sharded = (weights(by_two / f"{kind}-{strategy}") for strategy in BOTH)
    assert any(name.startswith(FRAMES[kind]) for name in copied)
    assert copied.keys() == sharded.keys()
    for name, weight in copied.items():
        torch.testing.assert_close(sharded[name], weight, atol=1e-5, rtol=1e-4)


def test_a_sharded_run_resumes_to_the_same_weights(by_two: Path) -> None:
    stopped = by_two / "stopped"
    assert [p.name for p in list_checkpoints(stopped)] == ["step_00000003"]
    run_processes([str(stopped), "6", "--strategy", "fsdp", "--resume"])  # in other processes
    assert_same(weights(by_two / "fsdp"), weights(stopped))


def test_a_checkpoint_folder_is_complete_and_rerunnable(tmp_path: Path) -> None:
    summary = run(tmp_path / "run")
    folder = Path(summary["checkpoint"])
    names = {f"{name}.json" for name in ("manifest", "config", "dataset", "normalization", "origin", "metrics")}
    assert {p.name for p in folder.iterdir()} == names | {"model.safetensors", "resume"}
    checkpoint = read_checkpoint(tmp_path / "run")
    assert checkpoint.config == to_json(tiny_experiment())
    again = resolve(str(folder / "config.json"), tiny_data().spec)
    assert again == tiny_experiment()
    run(tmp_path / "again", again)
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "again"))
    assert checkpoint.dataset == tiny_data().spec
    assert checkpoint.step == 6
    assert {"train/loss", "val/loss", "val/chunk_rmse"} <= checkpoint.metrics.keys()
    policy = load_policy(tmp_path / "run")
    action = policy.act({"position": np.zeros((3, 2), np.float32), "goal": np.ones((3, 2), np.float32)})
    assert action.shape == (3, 2)


def test_statistics_leave_held_out_episodes_alone(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny_experiment(3))
    data = tiny_data()
    from scd_robot.datasets import split_episodes

    _, held_out = split_episodes(data.num_episodes, 0.2, 0)
    start = np.r_[0, data.episode_ends][held_out[0]]
    data.arrays["goal"][start : data.episode_ends[held_out[0]]] = 50.0
    train(data, tiny_experiment(3), tmp_path / "other", accelerator="cpu", progress=False)
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "other"))


def test_fine_tuning_keeps_or_renews_statistics_as_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "old")
    old = read_checkpoint(tmp_path / "old")
    data = tiny_data()
    data.arrays["position"] *= 57
    for statistics in ("checkpoint", "dataset"):
        out = tmp_path / statistics
        caplog.clear()
        train(
            data,
            tiny_experiment(3, learning_rate=1e-12),
            out,
            init=tmp_path / "old",
            init_statistics=statistics,
            accelerator="cpu",
            progress=False,
        )
        new = read_checkpoint(out)
        same = new.normalizer.to_json()["position"] == old.normalizer.to_json()["position"]
        assert same == (statistics == "checkpoint")
        far = [record.getMessage() for record in caplog.records if "units" in record.getMessage()]
        assert [message.startswith("'position', dimension 0, is ") for message in far] == [True] * same
        for name, value in new.weights.items():
            torch.testing.assert_close(value, old.weights[name], atol=1e-6, rtol=1e-4)
    with pytest.raises(ConfigError, match="init-statistics"):
        train(data, tiny_experiment(3), tmp_path / "x", init=tmp_path / "old", accelerator="cpu", progress=False)
    with pytest.raises(ShapeError, match="another architecture"):
        train(
            data,
            tiny_experiment(3, model={"width": 32}),
            tmp_path / "x",
            init=tmp_path / "old",
            init_statistics="dataset",
            accelerator="cpu",
            progress=False,
        )


def test_a_policy_can_be_fine_tuned_to_delays(tmp_path: Path) -> None:
    """It has the same weights: none is for committed actions."""
    run(tmp_path / "whole", tiny_experiment(3))
    delays = tiny_experiment(3, model={"max_delay_steps": 2})
    options = {"init": tmp_path / "whole", "init_statistics": "checkpoint", "accelerator": "cpu", "progress": False}
    train(tiny_data(), delays, tmp_path / "delays", **options)
    assert [load_policy(tmp_path / name).spec.max_delay_steps for name in ("whole", "delays")] == [0, 2]


@pytest.mark.parametrize("most", [2, 3])
def test_no_delay_is_trained_that_leaves_no_action_to_wait_with(tmp_path: Path, most: int) -> None:
    """d <= H - s: chunks of 4 actions, 2 of which are executed."""
    settings, refused = tiny_experiment(1, model={"max_delay_steps": most}), most > 2
    with pytest.raises(ConfigError, match="over 2 control steps") if refused else nullcontext():
        run(tmp_path / "run", settings)
    assert (tmp_path / "run").exists() != refused


def test_an_entangled_policy_trains_and_can_lose_the_history_of_its_last_layers(tmp_path: Path) -> None:
    entangled = {"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1}
    run(tmp_path / "whole", tiny_experiment(3, model=entangled))
    old = read_checkpoint(tmp_path / "whole")
    assert old.policy == "causal_dit"
    options = {"init": tmp_path / "whole", "init_statistics": "checkpoint"}
    cut = tiny_experiment(3, model={**entangled, "local_layers": 2}, learning_rate=1e-12)
    train(tiny_data(), cut, tmp_path / "cut", **options, accelerator="cpu", progress=False)
    new = read_checkpoint(tmp_path / "cut")
    for name, value in new.weights.items():
        torch.testing.assert_close(value, old.weights[name], atol=1e-6, rtol=1e-4)
    assert load_policy(tmp_path / "cut").model.config.local_layers == 2
    separable = tiny_experiment(3, model={"num_context_tokens": 1})
    with pytest.raises(ShapeError, match="architecture: 'entangled' there, 'separable' here"):
        train(tiny_data(), separable, tmp_path / "x", **options, accelerator="cpu", progress=False)


def test_a_run_is_never_overwritten_and_resumes_with_its_own_settings_only(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny_experiment(3))
    before = weights(tmp_path / "run")
    with pytest.raises(OutputError, match="already holds a run at step_00000003"):
        run(tmp_path / "run", tiny_experiment(3))
    with pytest.raises(CheckpointError, match=r"training\.learning_rate: 0\.001 there, 0\.01 here"):
        run(tmp_path / "run", tiny_experiment(3, learning_rate=0.01), resume=True)
    run(tmp_path / "run", tiny_experiment(3), resume=True)  # nothing left to do
    assert_same(before, weights(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        run(tmp_path / "nowhere", resume=True)
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*begun to resume from; train without --resume"):
        run(tmp_path / "begun", resume=True)


def test_nan_stops_training_and_keeps_earlier_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match="at step"):
        run(tmp_path / "run", tiny_experiment(60, learning_rate=1e30, warmup_steps=0, gradient_clip=0.0))
    data = tiny_data()
    data.arrays["goal"][3, 0] = np.nan
    with pytest.raises(DatasetError, match=r"'goal'.*episode 0 at step 3"):
        train(data, tiny_experiment(), tmp_path / "nan", accelerator="cpu", progress=False)


@pytest.mark.parametrize(("stop", "seen"), [(KeyboardInterrupt, KeyboardInterrupt), (SIGTERMException, SystemExit)])
def test_a_run_that_is_stopped_says_so_and_where_it_can_go_on(tmp_path: Path, monkeypatch, caplog, stop, seen) -> None:
    step, on_interrupt = ScdLightningModule.training_step, signal.getsignal(signal.SIGINT)

    def stopping(self: ScdLightningModule, *batch: object) -> object:
        if self.global_step == 3:
            raise stop
        return step(self, *batch)

    monkeypatch.setattr(ScdLightningModule, "training_step", stopping)
    with pytest.raises(seen) as stopped:
        run(tmp_path / "run", tiny_experiment(4, validate_every=2))
    assert seen is KeyboardInterrupt or stopped.value.code == 143
    assert "was stopped; --resume goes on from step_00000002" in caplog.text
    assert signal.getsignal(signal.SIGINT) is on_interrupt


def test_a_dataset_of_other_widths_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShapeError, match="'position' of shape"):
        run(tmp_path / "run", tiny_experiment(model={"observation_shapes": {"position": (3,), "goal": (2,)}}))
    with pytest.raises(ShapeError, match="width 5"):
        run(tmp_path / "run", tiny_experiment(model={"action_dim": 5}))


def test_closed_loop_evaluation_runs_on_averaged_weights_and_is_stored_with_its_step(tmp_path: Path) -> None:
    seen = []

    def evaluate(policy) -> dict[str, float]:
        seen.append({n: p.clone() for n, p in policy.model.named_parameters()})
        return {"success_rate": 0.25 * len(seen)}

    run(tmp_path / "run", tiny_experiment(9), evaluate=evaluate, evaluate_every=6)
    assert len(seen) == 1
    folders = list_checkpoints(tmp_path / "run")
    assert_same(seen[0], load_file(folders[1] / "model.safetensors"))
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    assert [m.get("eval/success_rate") for m in metrics] == [None, 0.25, None]


def test_the_last_short_epoch_is_validated_too(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny_experiment(7))
    values = [json.loads((f / "metrics.json").read_text())["val/loss"] for f in list_checkpoints(tmp_path / "run")]
    assert len(set(values)) == 3
    run(tmp_path / "whole", tiny_experiment(7, validate_every=7))
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_only_the_two_newest_checkpoints_keep_their_training_state(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny_experiment(9))
    assert [(f / "resume").is_dir() for f in list_checkpoints(tmp_path / "run")] == [False, True, True]


def test_a_run_resumes_on_its_own_data_and_statistics_only(tmp_path: Path) -> None:
    run(tmp_path / "old")
    fine = {"init": tmp_path / "old", "init_statistics": "checkpoint"}
    data = tiny_data()
    data.arrays["position"] *= 3
    options = {"accelerator": "cpu", "progress": False}
    train(data, tiny_experiment(6), tmp_path / "whole", **fine, **options)
    train(data, tiny_experiment(6), tmp_path / "run", **fine, **options)
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    with pytest.raises(CheckpointError, match="dataset"):
        run(tmp_path / "run", resume=True, **fine)
    with pytest.raises(CheckpointError, match="init"):
        train(data, tiny_experiment(6), tmp_path / "run", resume=True, **options)
    train(data, tiny_experiment(6), tmp_path / "run", resume=True, **fine, **options)
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    statistics = [read_checkpoint(tmp_path / name).normalizer.to_json() for name in ("old", "whole", "run")]
    assert statistics[0] == statistics[1] == statistics[2]


def test_a_run_resumes_with_its_own_weights_only(tmp_path: Path) -> None:
    """How often each dataset is drawn decides the result as much as the data."""
    options = {"accelerator": "cpu", "progress": False}
    mixed = {share: mix_datasets([tiny_data(), tiny_data()], [1, share]) for share in (1, 3)}
    train(mixed[1], tiny_experiment(6), tmp_path / "run", **options)
    assert read_checkpoint(tmp_path / "run").origin["shares"] == [0.5, 0.5]
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    with pytest.raises(CheckpointError, match="was run otherwise"):
        train(mixed[3], tiny_experiment(6), tmp_path / "run", resume=True, **options)
    assert train(mixed[1], tiny_experiment(6), tmp_path / "run", resume=True, **options)["steps"] == 6


def test_a_decoder_alone_is_not_trained_beside_a_random_encoder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="without --init it would be a random one"):
        run(tmp_path / "run", tiny_experiment(3, trained="decoder"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("seed", "told"), [(0, False), (5, True)])
def test_another_split_of_what_a_checkpoint_knows_is_told(tmp_path: Path, caplog, seed: int, told: bool) -> None:
    run(tmp_path / "old")
    run(tmp_path / "new", tiny_experiment(3, seed=seed), init=tmp_path / "old", init_statistics="checkpoint")
    assert ("learned from many that count as held out" in caplog.text) == told


def test_logs_are_written_for_tensorboard_and_as_csv(tmp_path: Path) -> None:
    run(tmp_path / "run")
    table = next((tmp_path / "run" / "logs").rglob("metrics.csv")).read_text()
    assert {"train/loss", "val/chunk_rmse", "step"} <= set(table.splitlines()[0].split(","))
    assert list((tmp_path / "run" / "logs" / "tensorboard").rglob("events.out.tfevents*"))


def test_validation_error_does_not_depend_on_the_batch_size(tmp_path: Path) -> None:
    errors = []
    for size in (1, 4):
        out = tmp_path / str(size)
        run(out, tiny_experiment(1, batch_size=size, learning_rate=1e-12, held_out=0.6))
        errors.append(read_checkpoint(out).metrics["val/chunk_rmse"])
    assert errors[0] == pytest.approx(errors[1], rel=1e-4)


def test_learning_rate_warms_up_and_falls_as_a_cosine_and_the_decoder_has_its_own() -> None:
    settings = tiny_experiment(100, warmup_steps=10, final_learning_rate=0.1, learning_rate=0.5).training
    factors = [learning_rate_factor(step, settings) for step in (0, 4, 9, 10, 55, 100)]
    assert factors == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.55, 0.1])
    module = ScdLightningModule(
        tiny_experiment(learning_rate=0.5, decoder_learning_rate_factor=3.0), Normalizer({}, {})
    )
    groups = module.configure_optimizers()["optimizer"].param_groups
    rates = {id(p): (group["initial_lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    for name, parameter in module.model.named_parameters():
        rate, decay = rates[id(parameter)]
        assert rate == (1.5 if name.startswith("decoder.") else 0.5)
        assert (decay > 0) == (parameter.ndim > 1)


def test_bf16_trains_with_float32_weights(tmp_path: Path) -> None:
    run(tmp_path / "run", tiny_experiment(3, precision="bf16-mixed"))
    assert {value.dtype for value in weights(tmp_path / "run").values()} == {torch.float32}


def test_ema_decay_grows_as_stated() -> None:
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    ema = Ema(module, 0.5)
    torch.nn.init.ones_(module.weight)
    expected = 0.0
    for n in range(1, 20):
        ema.update(module)
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + 1 - decay
        assert float(ema.shadow["weight"]) == pytest.approx(expected, rel=1e-5)
    with ema.applied_to(module):
        assert module.weight.item() == pytest.approx(expected, rel=1e-5)
    assert module.weight.item() == 1.0
