"""The training loss: one encoder pass over whole segments, many decoder samples from its contexts.

Shapes: B segments, T steps, M positions, S noise draws, R = B * M * S decoder samples, k past actions, Ta chunk length,
L = k + Ta, Da action width, K context tokens, D width. For models of frames L is the number of patches, Da that of
numbers in one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from scd_robot.diffusion import SamplerConfig, corrupt, interpolate, mean_flow, shortcut
from scd_robot.model import ActionModel, Denoiser, FrameDenoiser, FrameModel, HistoryModel, JointModel
from scd_robot.nn import take_steps
from scd_robot.normalization import Normalizer
from scd_robot.training.augmentation import augmented
from scd_robot.training.batches import Draws, TrainingBatch
from scd_robot.training.config import Objective
from scd_robot.training.self_forcing import OwnFrames, with_own_frames

__all__ = [
    "DecoderSamples",
    "encode_batch",
    "held_out_errors",
    "loss_terms",
    "losses",
    "sampled_errors",
    "select_samples",
    "velocity_error",
]

_AVERAGE_VELOCITY = {"mean_flow": mean_flow, "shortcut": shortcut}


@dataclass(frozen=True)
class DecoderSamples:
    """What the decoder is trained on, normalised.

    Attributes:
        context: (R, K, D), not corrupted; or the entangled model's `HistoryContext` of R samples.
        data: (R, L, Da) the last k executed actions and the chunk's Ta labels (executed ones in the committed prefix);
            or the patches of the next frame.
        counted: (R,) bool; False for padding.
        valid: (R, L) bool; False before the history begins and past the episode's end: masked in attention, no loss.
            None = all are there.
        committed: (R, L) bool; actions given clean, no loss. None = no action.
        action: (R, Da) executed in each sample's control step; where frames are decoded only, as the next.
        known: (R, L, Dx) what is known of the next frame: the patches of that control step's.
        frames: what a frame decoder beside actions is trained on, from the same pass of the encoder; else None.
    """

    context: Any
    data: Tensor
    counted: Tensor
    valid: Tensor | None = None
    committed: Tensor | None = None
    action: Tensor | None = None
    known: Tensor | None = None
    frames: "DecoderSamples | None" = None

    def tokens_counted(self) -> Tensor:
        """(R, L) bool, which tokens the loss is of."""
        counted = self.counted[:, None].expand(self.data.shape[:2])
        counted = counted if self.valid is None else self.valid & counted
        return counted if self.committed is None else counted & ~self.committed


def encode_batch(model: HistoryModel[Any], normalizer: Normalizer, batch: TrainingBatch) -> Tensor:
    """Contexts (B, T, K, D) of all steps, with teacher forcing."""
    return model.encode(**_history(model, normalizer, batch))


def _history(model: HistoryModel[Any], normalizer: Normalizer, batch: TrainingBatch) -> dict[str, Any]:
    """What the model is shown of the segments, as keyword arguments of `HistoryModel.encode`."""
    segments = batch.segments
    seen = augmented(segments.observation, batch.draws.image_shift, batch.draws.image_colour)
    # Pictures past a segment's end are not there, so that nobody encodes them.
    pictures = {key: segments.present.get(key, True) & segments.step_valid for key in model.config.image_keys}
    past_action = None
    if model.config.past_action_input != "none":
        past_action = normalizer.normalize("action", segments.past_action)
        if model.config.past_action_input == "noised" and model.training:
            past_action = past_action + model.config.past_action_noise * batch.draws.past_action_noise
    return {
        "observation": normalizer.normalize_observation(seen),
        "past_action": past_action,
        "present": {**segments.present, **pictures} or None,
        "stream": batch.draws.stream,
    }


def select_samples(model: HistoryModel[Any], normalizer: Normalizer, batch: TrainingBatch) -> DecoderSamples:
    """Encodes the segments and gathers context of the drawn positions, and what is to be decoded there."""
    draws, history = batch.draws, _history(model, normalizer, batch)
    recorded, own = history["observation"], None
    if draws.rolls is not None:
        assert isinstance(model, FrameModel)
        past = normalizer.normalize("action", batch.segments.past_action)
        history, own = with_own_frames(model, history, past, draws.rolls)
    copies, executed = draws.flow_time.shape[2], normalizer.normalize("action", batch.segments.executed)
    if isinstance(model, JointModel):
        assert draws.frames is not None
        contexts, of_pictures = model.encode_both_at(draws.position, **history)
        positions = slice(draws.frames.position.shape[1])
        of_pictures = model.samples(of_pictures[:, positions], copies)
        action = executed[:, positions, model.config.num_past_actions]
        frames = _frame_samples(model.frame_head, recorded, draws.frames, history, of_pictures, action)
        return replace(_action_samples(model, normalizer, batch, model.samples(contexts, copies)), frames=frames)
    context = model.samples(model.encode_at(draws.position, **history), copies)
    if isinstance(model, FrameModel):
        return _frame_samples(model, recorded, draws, history, context, executed[:, :, 0], own)
    return _action_samples(model, normalizer, batch, context)


def _frame_samples(
    model: FrameDenoiser[Any],
    recorded: Mapping[str, Tensor],
    draws: Draws,
    history: Mapping[str, Any],
    context: Any,
    action: Tensor,
    own: OwnFrames | None = None,
) -> DecoderSamples:
    """What follows the pictures of the drawn positions, as they are seen, after actions (B, M, Da) executed there.

    That is the recorded next frame (of `recorded`, by key), also where the last one is the model's own.
    """
    camera, copies = model.config.frames.camera, draws.flow_time.shape[2]
    frames, there = history["observation"][camera], history["present"][camera]
    follows = there & torch.nn.functional.pad(there[:, 1:], (0, 1))
    after = (draws.position + 1).clamp(max=frames.shape[1] - 1)  # beyond it only where a position does not count

    def flat(x: Tensor) -> Tensor:  # (B, M, ...) -> (R, ...)
        return x.flatten(0, 1).repeat_interleave(copies, 0)

    last = take_steps(frames, draws.position).flatten(0, 1)
    next_frame = take_steps(recorded[camera], after).flatten(0, 1)
    known = model.known(last)  # of each picture once, whatever the number of noise draws
    known = known if own is None else own.over(known, draws.position)
    data, known = (x.repeat_interleave(copies, 0) for x in (model.tokens(next_frame, known), known))
    counted = flat(draws.position_valid & take_steps(follows, draws.position))
    return DecoderSamples(context, data, counted, action=flat(action), known=known)


def _action_samples(
    model: HistoryModel[Any], normalizer: Normalizer, batch: TrainingBatch, context: Any
) -> DecoderSamples:
    """Executed actions and labels around the drawn positions."""
    config, draws = model.config, batch.draws
    past, copies = config.num_past_actions, draws.flow_time.shape[2]
    offset = torch.arange(-past, config.chunk_length, device=draws.position.device)
    executed = normalizer.normalize("action", batch.segments.executed)
    label = normalizer.normalize("action", batch.segments.label)
    # A history that begins at a virtual reset, or inside an episode, knows no actions from before.
    own = draws.stream.gather(1, draws.position)
    begins = (draws.stream[:, None] == own[..., None]).int().argmax(-1)
    known = config.history_stride * (draws.position - begins)[:, :, None] + offset >= 0
    valid = batch.segments.action_valid & ((offset >= 0) | known)

    def flat(x: Tensor) -> Tensor:  # (B, M, ...) -> (R, ...)
        return x[:, :, None].expand(-1, -1, copies, *x.shape[2:]).flatten(0, 2)

    valid = flat(valid)
    committed = (offset >= 0) & (offset < draws.delay[..., None])
    committed = committed.flatten(0, 2) & valid
    use_executed = committed | (offset < 0)
    data = torch.where(use_executed[..., None], flat(executed), flat(label))
    if batch.segments.disturbed is not None:
        unforeseen = flat(batch.segments.disturbed) & ~committed
        valid = valid & (unforeseen.cumsum(-1) == unforeseen)  # up to the first of them
    return DecoderSamples(context, data, flat(draws.position_valid), valid, committed)


def loss_terms(
    model: HistoryModel[Any], normalizer: Normalizer, batch: TrainingBatch, objective: Objective = "flow_matching"
) -> tuple[Tensor, Tensor]:
    """The training loss of a batch, without that of frames beside actions; see `velocity_error`."""
    return velocity_error(model, select_samples(model, normalizer, batch), batch.draws, objective)


def losses(
    model: HistoryModel[Any], samples: DecoderSamples, draws: Draws, objective: Objective
) -> dict[str, tuple[Tensor, Tensor]]:
    """`velocity_error` of the model's decoder as `loss`, and of a frame decoder beside actions as `frame_loss`."""
    found = {"loss": velocity_error(model, samples, draws, objective)}
    if isinstance(model, JointModel):
        assert samples.frames is not None
        assert draws.frames is not None
        found["frame_loss"] = velocity_error(model.frame_head, samples.frames, draws.frames)
    return found


def velocity_error(
    model: Denoiser[Any], samples: DecoderSamples, draws: Draws, objective: Objective = "flow_matching"
) -> tuple[Tensor, Tensor]:
    """Sum of squared velocity errors over counted tokens (mean over Da), and their number, both scalars.

    The mean over a global batch is the quotient of the two sums over all devices. Velocities are those of `objective`:
    averages over steps for mean_flow and shortcut. For mip, whose flow times are 0 and `MIP_TIME`, the data is
    predicted as x + (1 - t) * velocity, from zeros at 0; errors of velocities are its errors divided by 1 - t, as in
    its authors' code.
    """
    config = model.config
    context, known = samples.context, None
    if isinstance(model, FrameDenoiser):
        assert samples.action is not None
        context, known = model.with_action(context, samples.action), samples.known
    if config.context_corruption:
        context = corrupt(context, draws.corruption.flatten(0, 2), config.context_corruption)
    flow_time, noise = draws.flow_time.flatten()[:, None], draws.noise.flatten(0, 2)
    end_time = draws.end_time.flatten()[:, None] if config.step_end_input else flow_time
    if objective == "mip":
        noise = torch.where(flow_time[..., None] > 0, noise, 0.0)
    if config.max_delay_steps:
        assert samples.committed is not None
        flow_time, end_time = (torch.where(samples.committed, 1.0, time) for time in (flow_time, end_time))
    path = interpolate(noise, samples.data, flow_time)

    def velocity(x: Tensor, start: Tensor, end: Tensor) -> Tensor:
        return model.velocity(x, start, context, samples.valid, end, known)

    if objective in _AVERAGE_VELOCITY:
        said, target = _AVERAGE_VELOCITY[objective](velocity, path.x_t, flow_time, end_time, path.velocity)
    else:
        said, target = velocity(path.x_t, flow_time, flow_time), path.velocity
    counted = samples.tokens_counted()
    error = (said.float() - target).square().mean(-1)
    return torch.where(counted, error, 0.0).sum(), counted.sum()


def held_out_errors(
    model: HistoryModel[Any], samples: DecoderSamples, draws: Draws, sampler: SamplerConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """`sampled_errors`, also of a frame decoder beside actions, whose sampler is the default one."""
    found = sampled_errors(model, samples, draws, sampler)
    if isinstance(model, JointModel):
        assert samples.frames is not None
        assert draws.frames is not None
        found |= sampled_errors(model.frame_head, samples.frames, draws.frames, SamplerConfig())
    return found


def sampled_errors(
    model: Denoiser[Any], samples: DecoderSamples, draws: Draws, sampler: SamplerConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """What is sampled as it will be in use, against the data: sums of squared errors (mean over Da) and their number.

    Of actions `chunk`, and `first_action` of it. Of frames `frame`, and `repeated_frame`: that of the last one again.
    """
    future = slice(model.config.num_past_actions, None)
    noise, counted = draws.noise.flatten(0, 2)[:, future], samples.tokens_counted()[:, future]

    def sums(error: Tensor) -> tuple[Tensor, Tensor]:
        of_tokens = error.square().mean(-1) * counted[:, : error.shape[1]]
        return of_tokens.sum(), counted[:, : error.shape[1]].sum()

    if isinstance(model, FrameDenoiser):
        assert samples.action is not None
        assert samples.known is not None
        tokens = model.imagine(samples.context, samples.action, samples.known, sampler=sampler, noise=noise)
        again = model.leading(samples.known, samples.known)
        return {"frame": sums(tokens - samples.data), "repeated_frame": sums(again - samples.data)}
    assert isinstance(model, ActionModel)
    plan = model.plan(samples.context, sampler=sampler, noise=noise)
    error = plan.actions - samples.data[:, future]
    return {"chunk": sums(error), "first_action": sums(error[:, :1])}
