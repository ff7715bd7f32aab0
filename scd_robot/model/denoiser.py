"""What all models have that denoise tokens: a decoder, and what it is asked for in training and by solvers.

Shapes: B or R samples, L tokens, Da numbers in one, K context tokens, D width.
"""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor, nn

from scd_robot.diffusion import SamplerConfig, corrupt, guide
from scd_robot.diffusion.sampler import evaluation_times
from scd_robot.errors import ConfigError
from scd_robot.model.config import ScdConfig
from scd_robot.model.decoder import Conditioning

__all__ = ["ContextT", "Denoiser", "check_sampler"]


class _Context(Protocol):
    def __len__(self) -> int: ...

    def clone(self) -> Self: ...


ContextT = TypeVar("ContextT", bound=_Context)


class Denoiser(nn.Module, Generic[ContextT]):
    """A decoder that denoises tokens, given a context of the subclass's type; where that comes from is not its matter.

    All inputs and outputs are normalised tensors, pictures uint8.
    """

    # has position, prepare(context), condition(flow_time, end_time) and velocity(x, conditioning, prepared, valid)
    decoder: Any

    def __init__(self, config: ScdConfig) -> None:
        super().__init__()
        self.config = config

    def velocity(
        self,
        x: Tensor,
        flow_time: Tensor,
        context: ContextT,
        token_valid: Tensor | None = None,
        end_time: Tensor | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """One evaluation of the decoder, as training needs it.

        Args:
            x: (R, L, Da) noisy tokens: all positions, or all but the past actions.
            flow_time: (R, L), or (R, 1) for one flow time shared by all tokens.
            context: of R samples.
            token_valid: (R, L) bool, tokens that exist; the others are seen by nobody. None = all.
            end_time: like flow_time, with `step_end_input`: where the step ends. None = it has no length.
            known: (R, L, any) what is known of each token, in models of frames.

        Returns:
            (R, L, Da).
        """
        conditioning, prepared = self.decoder.condition(flow_time, end_time), self.decoder.prepare(context)
        x = x if known is None else torch.cat((x, known), dim=-1)
        out: Tensor = self.decoder.velocity(x, conditioning, prepared, token_valid)
        return out

    def _velocity(
        self,
        context: ContextT,
        conditioning: Mapping[float, Conditioning],
        token_valid: Tensor | None,
        guidance_scale: float,
        corruption_noise: Tensor | None,
    ) -> Callable[[Tensor, float], Tensor]:
        """The decoder as solvers call it.

        Args:
            context: of B samples.
            conditioning: of the sampler, from `conditioning`.
            token_valid: (B, L) bool, tokens that exist; None = all.
            guidance_scale: above 1, extrapolates away from a corrupted context, for twice the decoder calls.
            corruption_noise: (B, K, D) standard normal for that; None = drawn.
        """
        config, prepared = self.config, self.decoder.prepare(context)

        def velocity(x: Tensor, time: float) -> Tensor:
            out: Tensor = self.decoder.velocity(x, conditioning[time], prepared, token_valid)
            return out

        if guidance_scale == 1.0:
            return velocity
        if config.context_corruption == 0:
            raise ConfigError("guidance needs a model trained with context_corruption > 0, this one has 0")
        assert isinstance(context, Tensor)  # only such a model has corruption
        drawn = torch.randn_like(context) if corruption_noise is None else corruption_noise
        weak = self.decoder.prepare(corrupt(context, drawn, config.context_corruption))

        def extrapolated(x: Tensor, time: float) -> Tensor:
            return guide(
                velocity(x, time), self.decoder.velocity(x, conditioning[time], weak, token_valid), guidance_scale
            )

        return extrapolated

    def conditioning(self, sampler: SamplerConfig, committed: Tensor | None = None) -> dict[float, Conditioning]:
        """What the decoder derives from each flow time at which `sampler` will call it, in one pass.

        Args:
            sampler: solver and number of denoising steps.
            committed: (1, L) bool, tokens that are shown at flow time 1; None = none.
        """
        check_sampler(self.config, sampler)
        times = evaluation_times(sampler)
        weight = self.decoder.position
        flow_time = torch.tensor(times, device=weight.device, dtype=weight.dtype)[:, None]
        end_time = flow_time + 1 / sampler.num_denoising_steps if sampler.solver == "average" else flow_time
        if committed is not None:
            flow_time, end_time = (torch.where(committed, 1.0, time) for time in (flow_time, end_time))
        conditions = self.decoder.condition(flow_time, end_time)
        return {time: conditions[i] for i, time in enumerate(times)}


def check_sampler(config: ScdConfig, sampler: SamplerConfig) -> None:
    """Raises ConfigError where a model of this architecture does not say what the solver needs."""
    if config.decodes_frames and sampler.solver not in ("euler", "midpoint"):
        raise ConfigError(
            f"frames are denoised by solver 'euler' or 'midpoint', which never ask at flow time 1, got "
            f"{sampler.solver!r}"
        )
    if sampler.solver == "average" and not config.step_end_input:
        raise ConfigError(
            "solver 'average' needs a model with step_end_input, trained by the objective mean_flow or shortcut "
            "(scd distill); use solver 'euler'"
        )
