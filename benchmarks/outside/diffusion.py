"""Diffusion Policy (arXiv 2303.04137): LeRobot's, as it is, with its U-Net or our transformer in the U-Net's place.

Loss, noise schedule, normalisation and sampling are LeRobot's. Its training script has no moving average of the weights
and no weight decay that spares biases, as the paper has; both are added here.

Shapes: B rows, To observations, H actions (LeRobot's `horizon`), Do and Da widths.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from outside.demonstrations import Demonstrations, Windows, read_demonstrations
from outside.rows import Array, ChunkPolicy
from outside.shim import mend_torchvision
from outside.transformer import ActionTransformer
from torch import Tensor, nn

mend_torchvision()

from diffusers.training_utils import EMAModel  # noqa: E402 - after the mending
from lerobot.configs.types import FeatureType, NormalizationMode, PolicyFeature  # noqa: E402
from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig  # noqa: E402
from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy  # noqa: E402
from lerobot.policies.diffusion.processor_diffusion import make_diffusion_pre_post_processors  # noqa: E402

__all__ = ["TRAINING", "Trainer", "build", "load_policy"]

STATE, REST, ACTION = "observation.state", "observation.environment_state", "action"
# Of about our default's 1.5 million parameters; LeRobot's and the paper's own: down_dims [512, 1024, 2048].
UNET = {"down_dims": [32, 64, 136]}
# The paper's are the defaults of ActionTransformer: 8 layers, 256 wide. These have about 1.5 million parameters.
TRANSFORMER = {"horizon": 10, "width": 128, "layers": 5, "heads": 4, "dropout": 0.3}
# The paper's, but for the learning rate, which is 1e-4 there, for larger networks and many more updates: with it the
# mean loss of this U-Net over updates 501 to 1000 (50 demonstrations of push-v3) was 0.19, with 1e-3 0.06.
TRAINING = {
    "unet": {"learning_rate": 1e-3, "betas": [0.95, 0.999], "weight_decay": 1e-6},
    "transformer": {"learning_rate": 1e-3, "betas": [0.9, 0.95], "weight_decay": 1e-3},
}
BATCH_SIZE, WARMUP = 64, 100
EMA = {"decay": 0.9999, "use_ema_warmup": True, "inv_gamma": 1.0, "power": 0.75}  # the paper's
_CONSTANT = 1e-4  # a smaller range is noise of the simulator, which must not be stretched to [-1, 1]


def build(config: dict[str, Any], sampler: dict[str, Any] | None = None) -> tuple[DiffusionPolicy, Any, Any]:
    """The policy of a configuration, with LeRobot's processors before and after it.

    Args:
        config: `network` ("unet" or "transformer"), `model` (fields of DiffusionConfig, and of ActionTransformer),
            `widths` of the observation keys, `action_dim`, and `statistics`.
        sampler: fields of DiffusionConfig that replace those of the configuration.
    """
    state, rest = _split(list(config["widths"].values()))
    features = {
        STATE: PolicyFeature(FeatureType.STATE, (state,)),
        REST: PolicyFeature(FeatureType.ENV, (rest,)),
    }
    model = dict(config["model"])
    ours = {name: model.pop(name) for name in ("width", "layers", "heads", "dropout") if name in model}
    if config["network"] == "transformer":
        model["down_dims"] = [8]  # of the U-Net that is replaced
    known = DiffusionConfig(
        input_features=features,
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (config["action_dim"],))},
        normalization_mapping=dict.fromkeys(("STATE", "ENV", "ACTION"), NormalizationMode.MIN_MAX),
        device="cpu",
        **{**model, **(sampler or {})},
    )
    known.drop_n_last_frames = known.horizon - known.n_action_steps - known.n_obs_steps + 1
    policy = DiffusionPolicy(known)
    if config["network"] == "transformer":
        shape = {"horizon": known.horizon, "num_observations": known.n_obs_steps}
        policy.diffusion.unet = ActionTransformer(config["action_dim"], state + rest, **shape, **ours)
    tensors = {
        key: {name: torch.tensor(values) for name, values in told.items()} for key, told in config["statistics"].items()
    }
    return policy, *make_diffusion_pre_post_processors(known, tensors)


class Trainer:
    """Updates by AdamW on windows drawn at random.

    Args:
        dataset: robomimic HDF5 file.
        seed: of weights, windows and noise.
        training: replaces `TRAINING`, `batch_size` and `warmup` (updates).
        model: `network`, and what replaces fields of LeRobot's DiffusionConfig and of ActionTransformer.
    """

    def __init__(self, dataset: Path, seed: int, training: dict[str, Any], model: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        network = model.pop("network", "unet")
        self._settings = {**TRAINING[network], "batch_size": BATCH_SIZE, "warmup": WARMUP, **training}
        demonstrations = read_demonstrations(dataset)
        self.config = {
            "network": network,
            "model": {**(UNET if network == "unet" else TRANSFORMER), **model},
            "training": self._settings,
            "widths": demonstrations.widths,
            "action_dim": demonstrations.action.shape[1],
            "statistics": _statistics(demonstrations),
        }
        self._policy, self._before, _ = build(self.config)
        known = self._policy.config
        self._windows = Windows(demonstrations, known.n_obs_steps, known.horizon, known.drop_n_last_frames)
        self._rng = np.random.default_rng(seed)
        self._optimiser = torch.optim.AdamW(
            _groups(self._policy, self._settings["weight_decay"]),
            self._settings["learning_rate"],
            tuple(self._settings["betas"]),
        )
        self._average = EMAModel(self._policy.parameters(), **EMA)
        self._updates = 0

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        return self._policy

    def step(self, progress: float) -> float:
        """One update; the loss before it. `progress` is the share of the training that is over."""
        warm = min(1.0, (self._updates + 1) / self._settings["warmup"])
        for group in self._optimiser.param_groups:
            group["lr"] = self._settings["learning_rate"] * warm * 0.5 * (1 + np.cos(np.pi * min(progress, 1.0)))
        rows = self._rng.choice(self._windows.rows, self._settings["batch_size"])
        observation, action, outside = (torch.from_numpy(array) for array in self._windows.at(rows))
        batch = self._before({**_observation(self.config, observation), ACTION: action})
        loss, _ = self._policy({**batch, "action_is_pad": outside})
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()
        self._average.step(self._policy.parameters())
        self._updates += 1
        return float(loss.detach())

    def weights(self) -> dict[str, Tensor]:
        """The moving average."""
        self._average.store(self._policy.parameters())
        self._average.copy_to(self._policy.parameters())
        state = {name: tensor.clone() for name, tensor in self._policy.state_dict().items()}
        self._average.restore(self._policy.parameters())
        return state


def load_policy(config: dict[str, Any], weights: dict[str, Tensor], seed: int = 0, **sampler: Any) -> ChunkPolicy:
    """The trained policy.

    Args:
        config: a trainer's.
        weights: a trainer's.
        seed: of the noise. With DDPM the noise of later diffusion steps is not keyed by episodes.
        **sampler: fields of LeRobot's DiffusionConfig: `noise_scheduler_type` ("DDPM" or "DDIM"),
            `num_inference_steps`, `n_action_steps`.
    """
    torch.manual_seed(seed)
    policy, before, after = build(config, sampler)
    policy.load_state_dict(weights)
    policy.eval()

    @torch.inference_mode()
    def plan(observation: Array, noise: Array) -> Array:
        batch = before(_observation(config, torch.from_numpy(observation)))
        chunk = policy.diffusion.generate_actions({key: batch[key] for key in (STATE, REST)}, torch.from_numpy(noise))
        return np.asarray(after(chunk).numpy(), np.float32)

    known = policy.config
    shape = (known.horizon, config["action_dim"])
    return ChunkPolicy(plan, list(config["widths"]), known.n_obs_steps, shape, seed)


def _split(widths: list[int]) -> tuple[int, int]:
    """Numbers in LeRobot's robot state and in its environment state, which it wants both: the first key, and the rest.

    The network sees them joined again.
    """
    state = widths[0] if len(widths) > 1 else 1
    return state, sum(widths) - state


def _observation(config: dict[str, Any], joined: Tensor) -> dict[str, Tensor]:
    """(B, To, Do) by LeRobot's names."""
    state, _ = _split(list(config["widths"].values()))
    return {STATE: joined[..., :state], REST: joined[..., state:]}


def _statistics(data: Demonstrations) -> dict[str, dict[str, list[float]]]:
    """Smallest and largest numbers by LeRobot's names; what is constant is mapped to 0, whatever it is later."""
    low, high = data.observation.min(0), data.observation.max(0)
    constant = high - low < _CONSTANT
    low, high = np.where(constant, low - 1, low), np.where(constant, high + 1, high)
    state, _ = _split(list(data.widths.values()))
    bounds = {
        STATE: (low[:state], high[:state]),
        REST: (low[state:], high[state:]),
        ACTION: (data.action.min(0), data.action.max(0)),
    }
    return {key: {"min": pair[0].tolist(), "max": pair[1].tolist()} for key, pair in bounds.items()}


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels only."""
    parameters = list(module.parameters())
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
