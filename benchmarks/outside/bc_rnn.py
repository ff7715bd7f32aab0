"""BC-RNN (arXiv 2108.03298): robomimic's, with its own configuration, dataset, network, loss and control.

Its defaults for vectors: LSTM, 2 layers of 400, mixture of 5 Gaussians, sequences of 10 control steps, batches of 100,
Adam with 1e-4.

Shapes: B rows, Da action width.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from outside.demonstrations import read_demonstrations
from outside.shim import mend_torchvision
from torch import Tensor, nn

mend_torchvision()

from robomimic.algo import algo_factory  # noqa: E402 - after the mending
from robomimic.config import config_factory  # noqa: E402
from robomimic.utils import obs_utils  # noqa: E402
from robomimic.utils.dataset import SequenceDataset  # noqa: E402

__all__ = ["Trainer", "load_policy"]


class Trainer:
    """Updates by robomimic's `train_on_batch` on batches of its `SequenceDataset`.

    Args:
        dataset: robomimic HDF5 file.
        seed: of weights and sequences.
        training: `batch_size`, `learning_rate`, `seq_length` (control steps of a sequence).
        model: `hidden_dim`, `num_layers`.
    """

    def __init__(self, dataset: Path, seed: int, training: dict[str, Any], model: dict[str, Any]) -> None:
        torch.manual_seed(seed)
        data = read_demonstrations(dataset)
        low, high = data.action.min(0), data.action.max(0)
        if np.abs(data.action).max() <= 1:  # its networks' means are in [-1, 1], and so are its own datasets
            low, high = -np.ones_like(low), np.ones_like(high)
        settings = {"batch_size": 100, "learning_rate": 1e-4, "seq_length": 10, **training}
        self.config = {
            "training": settings,
            "model": {"hidden_dim": 400, "num_layers": 2, **model},
            "widths": data.widths,
            "action_dim": data.action.shape[1],
            "action_low": low.tolist(),
            "action_high": high.tolist(),
        }
        self._algorithm = _build(self.config)
        sequences = SequenceDataset(
            hdf5_path=str(dataset),
            obs_keys=list(data.widths),
            dataset_keys=("actions",),
            seq_length=settings["seq_length"],
            pad_seq_length=True,
            hdf5_cache_mode="all",
            hdf5_use_swmr=False,
            load_next_obs=False,
        )
        generator = torch.Generator().manual_seed(seed)
        loader = torch.utils.data.DataLoader(
            sequences, settings["batch_size"], shuffle=True, drop_last=True, generator=generator
        )
        self._batches = _endless(loader)
        self._scale = torch.tensor(high - low), torch.tensor(low)

    @property
    def module(self) -> nn.Module:
        """What is trained."""
        nets: nn.Module = self._algorithm.nets
        return nets

    def step(self, progress: float) -> float:
        """One update; the loss before it. The learning rate is constant, as in robomimic, whatever the progress."""
        self._algorithm.set_train()
        batch = next(self._batches)
        spread, low = self._scale
        batch["actions"] = 2 * (batch["actions"] - low) / spread - 1
        ready = self._algorithm.process_batch_for_training(batch)
        return float(self._algorithm.train_on_batch(ready, epoch=0)["losses"]["action_loss"].detach())

    def weights(self) -> dict[str, Tensor]:
        """Of all networks."""
        return {name: tensor.clone() for name, tensor in self._algorithm.nets.state_dict().items()}


class BcRnnPolicy:
    """robomimic's `get_action`, row by row: its own state of the network is of a batch that begins together."""

    def __init__(self, config: dict[str, Any], algorithm: Any, seed: int) -> None:
        self._algorithm, self._keys, self._seed = algorithm, list(config["widths"]), seed
        self._low, self._high = (np.array(config[name], np.float32) for name in ("action_low", "action_high"))
        self._episodes: list[int] = []
        self._states: list[Any] = []

    def reset(self, rows: Sequence[int] | None = None, episodes: Sequence[int] | None = None) -> None:
        """Begins new episodes."""
        if rows is None:
            self._episodes, self._states = list(episodes or ()), []
            return
        for row, episode in zip(rows, episodes or rows, strict=True):
            self._episodes[row], self._states[row] = episode, (None, 0)

    @torch.inference_mode()
    def act(self, observation: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """One control step: (B, Da)."""
        seen = {key: torch.from_numpy(np.array(observation[key], np.float32)) for key in self._keys}
        batch = len(seen[self._keys[0]])
        if not self._states:
            self._states = [(None, 0)] * batch
            self._episodes = self._episodes or list(range(batch))
        actions = []
        for row in range(batch):
            hidden, steps = self._states[row]
            self._algorithm._rnn_hidden_state, self._algorithm._rnn_counter = hidden, steps
            torch.manual_seed(hash((self._seed, self._episodes[row], steps)))  # of the mixture's component
            action = self._algorithm.get_action({key: value[row : row + 1] for key, value in seen.items()})
            self._states[row] = self._algorithm._rnn_hidden_state, steps + 1
            actions.append(action[0].numpy())
        return ((np.stack(actions) + 1) / 2 * (self._high - self._low) + self._low).astype(np.float32)


def load_policy(config: dict[str, Any], weights: dict[str, Tensor], seed: int = 0) -> BcRnnPolicy:
    """The trained policy; `seed` is of its noise."""
    algorithm = _build(config)
    algorithm.nets.load_state_dict(weights)
    algorithm.set_eval()
    algorithm.reset()
    return BcRnnPolicy(config, algorithm, seed)


def _build(config: dict[str, Any]) -> Any:
    """robomimic's algorithm with a configuration of its own, changed where BC-RNN differs from BC."""
    known = config_factory("bc")
    with known.values_unlocked():
        known.observation.modalities.obs.low_dim = list(config["widths"])
        known.train.batch_size = config["training"]["batch_size"]
        known.train.seq_length = known.algo.rnn.horizon = config["training"]["seq_length"]
        known.algo.optim_params.policy.learning_rate.initial = config["training"]["learning_rate"]
        known.algo.actor_layer_dims = ()
        known.algo.rnn.enabled = known.algo.gmm.enabled = True
        known.algo.rnn.hidden_dim = config["model"]["hidden_dim"]
        known.algo.rnn.num_layers = config["model"]["num_layers"]
    obs_utils.initialize_obs_utils_with_config(known)
    shapes = {key: [width] for key, width in config["widths"].items()}
    return algo_factory("bc", known, shapes, config["action_dim"], torch.device("cpu"))


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader
