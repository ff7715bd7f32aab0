"""Training of models of frames on their own roll-outs, against drift: in use they read what they imagined before.

In a share of the segments the model imagines some frames, from the recorded ones before them and the recorded actions,
as it will in use: with its present weights, one after the other, each given to the encoder as the next picture. These
take the place of the recorded pictures, in what the encoder reads and as the last frame that the decoder is shown. What
is to be decoded stays the recorded next frame, so that the model learns to come back from where it drifts.

That histories of one's own are trained on is Self Forcing (Huang et al., arXiv 2506.08009). Its loss compares the
distributions of whole videos (DMD, SiD or a GAN) and has gradients through the last denoising steps of a roll-out. Here
there is neither: the loss remains flow matching towards recorded frames, and nothing is differentiated through the
roll-out. That is scheduled sampling (Bengio et al., arXiv 1506.03099), with whole roll-outs in the place of single
steps, and with the recording as the expert that labels what the learner came to (DAgger, Ross et al., arXiv 1011.0686;
for models of dynamics Venkatraman et al., "Improving Multi-Step Prediction of Learned Time Series Models", AAAI 2015).
Where actions and history leave open what happens, a frame imagined rightly may still be followed by another one than
the recorded, and such a loss is biased (Huszar, arXiv 1511.05101): the shorter the roll-outs, the less.

Shapes: B segments, T control steps, R roll-outs, F frames of one, L patches, Dx numbers in one, H W C picture, Da
action width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError
from scd_robot.model import FrameModel

__all__ = ["OwnFrames", "RollOuts", "SelfForcingConfig", "with_own_frames"]


@dataclass(frozen=True)
class SelfForcingConfig:
    """How a model of frames is trained on frames that it imagined itself.

    For these segments an update costs up to segment_length more steps of the encoder and frames * num_denoising_steps
    more calls of the decoder for one frame each, all without gradients and one after the other.

    Attributes:
        probability: share of segments in which it is; 0 = off.
        frames: of a roll-out; fewer where the segment, or the history before a virtual reset, ends sooner.
        num_denoising_steps: of each of them, by solver "euler".
    """

    probability: float = 0.0
    frames: int = 8
    num_denoising_steps: int = 4

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ConfigError(f"self_forcing.probability must be in [0, 1], got {self.probability}")
        for name in ("frames", "num_denoising_steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"self_forcing.{name} must be at least 1, got {getattr(self, name)}")

    def draw(self, stream: NDArray[np.int64], rng: np.random.Generator) -> tuple[int, int, int] | None:
        """Where the history begins, the first imagined control step, and one past the last; None = no roll-out.

        Args:
            stream: (T,) of one segment, see `Draws`; in its first control step a history has a recorded picture.
            rng: of this segment.
        """
        chosen, place = rng.random() < self.probability, rng.random()
        after_others = 1 + np.flatnonzero(stream[1:] == stream[:-1])
        if not chosen or not len(after_others):
            return None
        first = int(after_others[int(place * len(after_others))])
        same = np.flatnonzero(stream == stream[first])
        return int(same[0]), first, min(first + self.frames, int(same[-1]) + 1)


@dataclass(frozen=True)
class OwnFrames:
    """What is known of the frames that a model imagined, when it imagines on from them.

    With an autoencoder these are the latents that were denoised, as in use, not those of the decoded picture.

    Attributes:
        place: (B, T) int64 row of `known` for the picture of that control step; -1 = it is a recorded one.
        known: (n, L, Dx).
    """

    place: Tensor
    known: Tensor

    def over(self, known: Tensor, position: Tensor) -> Tensor:
        """What is known (B * M, L, Dx) of the pictures at `position` (B, M), in the place of that of recorded ones."""
        place = self.place.gather(1, position).flatten()
        return torch.where(place[:, None, None] >= 0, self.known[place.clamp(min=0)], known)


@dataclass
class RollOuts:
    """Which pictures of a batch the model imagines itself.

    Attributes:
        segment: (R,) int64 segment of each, none of them twice.
        begin: (R,) int64 control step in which its history begins.
        first: (R,) int64 first control step whose picture is imagined, after `begin`.
        stop: (R,) int64 one past the last.
        noise: (R, F, L, Dx) of the frames, `first` and those after it.
        num_denoising_steps: of each frame.
    """

    segment: Tensor
    begin: Tensor
    first: Tensor
    stop: Tensor
    noise: Tensor
    num_denoising_steps: int


def with_own_frames(
    model: FrameModel[Any], history: Mapping[str, Any], executed_before: Tensor, rolls: RollOuts
) -> tuple[dict[str, Any], OwnFrames]:
    """What the model is shown, with pictures that it imagined, and what is known of these; nothing is changed in place.

    A roll-out needs the recorded picture before it: where that is absent, there is none. A picture that is absent
    within it stays so for the encoder. There are no gradients.

    Args:
        model: as it is; it imagines in full precision, as in use, whatever the training's is.
        history: keyword arguments of `HistoryModel.encode`.
        executed_before: (B, T, Da) normalised, the action executed one control step before each.
        rolls: where.
    """
    camera, rows = model.config.frames.camera, rolls.segment
    pictures, past = history["observation"][camera].clone(), history["past_action"]
    there, last_step = history["present"][camera], pictures.shape[1] - 1
    sampler = SamplerConfig("euler", rolls.num_denoising_steps)
    place, own, roll = rows.new_full(pictures.shape[:2], -1), [], torch.arange(len(rows), device=rows.device)

    def read(at: Tensor, active: Tensor) -> Any:
        return model.encode_step(
            {camera: pictures[rows, at]},
            cache,
            active,
            past_action=None if past is None else past[rows, at],
            present={camera: there[rows, at]},
        )

    with torch.no_grad(), torch.autocast(pictures.device.type, enabled=False):
        cache, conditioning = model.new_cache(len(rows)), model.conditioning(sampler)
        goes = there[rows, rolls.first - 1]
        context: Any = None
        for back in range(int((rolls.first - rolls.begin).max()), 0, -1):  # all come to their roll-out together
            at = rolls.first - back
            context = read(at.clamp(min=0), at >= rolls.begin)
        known = model.known(pictures[rows, rolls.first - 1])
        for number in range(rolls.noise.shape[1]):
            at = (rolls.first + number).clamp(max=last_step)
            inside = goes & (rolls.first + number < rolls.stop)
            if number:
                context = read(at - 1, inside)
            tokens = model.imagine(
                context,
                executed_before[rows, at],
                known,
                sampler=sampler,
                noise=rolls.noise[:, number],
                conditioning=conditioning,
            )
            imagined, known = model.following(tokens, known)
            pictures[rows, at] = torch.where(inside[:, None, None, None], imagined, pictures[rows, at])
            place[rows, at] = torch.where(inside, number * len(rows) + roll, place[rows, at])
            own.append(known)
        shown = {**history, "observation": {**history["observation"], camera: pictures}}
        return shown, OwnFrames(place, torch.cat(own))
