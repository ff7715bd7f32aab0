"""Few-step objectives in training: what they change, what they leave alone, distillation, and what cannot work."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import LENGTHS, tiny_data, tiny_experiment

from scd_robot.checkpoint import read_checkpoint
from scd_robot.cli.main import main
from scd_robot.config import from_json
from scd_robot.diffusion import MIP_TIME
from scd_robot.errors import ConfigError, UnknownNameError
from scd_robot.model import build_model
from scd_robot.normalization import Normalizer, compute_statistics
from scd_robot.policies import load_policy
from scd_robot.presets import with_settings
from scd_robot.training import ExperimentConfig, SegmentDataset, loss_terms
from scd_robot.training.config import OBJECTIVES

DATA = tiny_data()
FEW_STEPS = [name for name in OBJECTIVES if name != "flow_matching"]
ENTANGLED = {"architecture": "entangled", "context_corruption": 0.0, "num_context_tokens": 1}


def batch_of(experiment: ExperimentConfig, step: int = 0):
    return SegmentDataset(DATA, experiment, np.arange(len(LENGTHS)))[step]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("model", [{}, {"fusion": "concat", "max_delay_steps": 2}, ENTANGLED])
def test_every_parameter_gets_a_gradient_of_every_objective(objective: str, model: dict) -> None:
    experiment = tiny_experiment(model=model).with_objective(objective)  # type: ignore[arg-type]
    torch.manual_seed(0)
    keys = [*experiment.model.observation_shapes, "action"]
    normalizer = Normalizer({k: compute_statistics(DATA.arrays[k], k) for k in keys}, dict.fromkeys(keys, "identity"))
    network = build_model(experiment.model)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    total, count = loss_terms(network, normalizer, batch_of(experiment), experiment.training.objective)
    (total / count).backward()
    assert torch.isfinite(total)
    assert not {n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    with torch.no_grad():  # as in validation
        again, _ = loss_terms(network, normalizer, batch_of(experiment), experiment.training.objective)
    torch.testing.assert_close(again, total.detach())


def test_objectives_share_all_draws_but_their_own() -> None:
    plain, average, mip = (
        batch_of(tiny_experiment().with_objective(name)).draws for name in ("flow_matching", "mean_flow", "mip")
    )
    assert not plain.end_time.numel()
    for name in ("noise", "position", "flow_time", "stream"):
        assert torch.equal(getattr(average, name), getattr(plain, name))
    assert (average.end_time >= average.flow_time).all()
    assert (average.end_time > average.flow_time).any()
    assert set(mip.flow_time.unique().tolist()) == {0.0, float(np.float32(MIP_TIME))}


@pytest.mark.parametrize("objective", FEW_STEPS)
def test_one_setting_brings_what_goes_with_an_objective(objective: str) -> None:
    experiment = with_settings(tiny_experiment(), [f"training.objective={objective}"])
    assert experiment.policy.sampler == OBJECTIVES[objective]  # type: ignore[index]
    assert experiment.model.step_end_input == (objective != "mip")
    one = ["policy.sampler.num_denoising_steps=1", f"training.objective={objective}"]
    assert with_settings(tiny_experiment(), one).policy.sampler.num_denoising_steps == 1


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["training.objective=mean_flow", "model.step_end_input=false"], "step_end_input"),
        (["policy.sampler.solver=average", "model.step_end_input=true"], "not for objective 'flow_matching'"),
        (["training.objective=mip", "policy.sampler.solver=euler"], "not for objective 'mip'; use 'mip'"),
        (["policy.sampler.solver=mip", "policy.sampler.num_denoising_steps=2"], "not for objective 'flow_matching'"),
        (["training.objective=mip", "policy.sampler.num_denoising_steps=4"], "1 or 2 denoising steps, got 4"),
        (["training.objective=mip", "policy.num_samples=2"], "all the same"),
        (["policy.sampler.solver=average"], "needs a model with step_end_input"),
        (["training.objective=mean_flow", "training.precision=bf16-mixed"], "set training.precision=32-true"),
    ],
)
def test_combinations_that_cannot_work_are_refused(settings: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        with_settings(tiny_experiment(), settings)


def test_a_misspelt_objective_is_suggested_and_an_entangled_encoder_is_not_frozen() -> None:
    with pytest.raises(UnknownNameError, match="mean_flow"):
        with_settings(tiny_experiment(), ["training.objective=meanflow"])
    with pytest.raises(ConfigError, match="use trained='all'"):
        with_settings(tiny_experiment(model=ENTANGLED), ["training.trained=decoder"])


@pytest.mark.parametrize("objective", FEW_STEPS)
def test_distilling_changes_the_decoder_alone_and_tells_of_its_teacher(
    objective: str, tiny_run: Path, tiny_store: Path, tmp_path: Path
) -> None:
    out = tmp_path / "student"
    options = ["--objective", objective, "--dataset", str(tiny_store), "--out", str(out), "--accelerator", "cpu"]
    assert main(["distill", str(tiny_run), *options, "--max-steps", "2", "--threads", "1"]) == 0
    teacher, student = read_checkpoint(tiny_run), read_checkpoint(out)
    changed = {n.partition(".")[0] for n, w in student.weights.items() if not torch.equal(w, teacher.weights.get(n, w))}
    assert changed == {"decoder"}
    assert set(student.weights) - set(teacher.weights) == {n for n in student.weights if "step_length" in n}
    assert student.origin["teacher"] == {"objective": "flow_matching", "weights_sha256": teacher.weights_sha256}
    assert student.normalizer.to_json() == teacher.normalizer.to_json()
    assert from_json(ExperimentConfig, student.config, "config").training.objective == objective
    policy = load_policy(out)
    assert policy.config.sampler == OBJECTIVES[objective]  # type: ignore[index]
    observation = {"position": np.zeros((3, 2), np.float32), "goal": np.ones((3, 2), np.float32)}
    action = policy.act(observation)
    assert action.shape == (3, 2)
    if objective == "mip":  # no noise: whatever the episode, the same
        np.testing.assert_allclose(action, action[[0, 0, 0]], rtol=1e-5)
        with pytest.raises(ConfigError, match="1 or 2"):
            load_policy(out, num_denoising_steps=8)
    else:
        assert load_policy(out, num_denoising_steps=8).config.sampler.num_evaluations == 8


def test_distilling_resumes_and_may_train_all(tiny_run: Path, tiny_store: Path, tmp_path: Path) -> None:
    options = ["--objective", "shortcut", "--dataset", str(tiny_store), "--accelerator", "cpu", "--train-encoder"]
    options += ["--threads", "1", "--max-steps", "2", "--out", str(tmp_path / "run")]
    assert main(["distill", str(tiny_run), *options]) == 0
    assert main(["distill", str(tiny_run), *options]) == 2
    assert main(["distill", str(tiny_run), *options, "--resume"]) == 0
    teacher, student = read_checkpoint(tiny_run), read_checkpoint(tmp_path / "run")
    changed = {n.partition(".")[0] for n, w in student.weights.items() if not torch.equal(w, teacher.weights.get(n, w))}
    assert changed == {"decoder", "encoder", "tokenizer"}
