"""Imagined frames: separable beside the entangled rival of the same depth and width, data and updates.

    python benchmarks/frames.py                     records, trains both, judges, times: report.md, frames.json, sheets
    python benchmarks/frames.py --only times        time per frame alone: nothing is trained, weights are random
    python benchmarks/frames.py --report            the tables of what is done
    python benchmarks/frames.py --pusht pusht_cchi_v7_replay.zarr        people's episodes of PushT instead
    python benchmarks/frames.py --only quality --arms separable self_forced        does training on own frames help?

Both are the preset frames_64. Frames are judged on a recording of its own (seed 1; of PushT, episodes that were held
out): the models see the first 16 frames of an episode and imagine the next 64 from the actions that were executed.
Beside both stands the last frame that was seen, repeated. All intervals are 95 %, bootstrap over episodes; those of
differences are paired. They cover the choice of episodes, not the seed of the training.

Times are of the wall clock, one thread, batch 1, a window full of history, 16 denoising steps: one picture and action
into the history, and the next frame denoised. All configurations take turns within each round; ratios are of medians,
with 5 to 95 % of the single rounds'. Beside the wall clock stands the CPU time of the process, which other load on the
machine lengthens less. The floor is the time that the products of matrices and the attention of the same frame take at
the GFLOP/s of a large float32 product; slopes are of a line through the medians by history. Recordings and trainings
that are done are not repeated, and one that was cut off continues.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, read_json
from latency import measure_machine, percentiles, ratio_of, timed
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from scd_robot.analysis.frame_metrics import curve
from scd_robot.analysis.imagination import describe, imagine_episodes, write_imagined
from scd_robot.analysis.position_probe import probe_errors, train_probe
from scd_robot.checkpoint import list_checkpoints
from scd_robot.datasets import POSITION, EpisodeDataset, open_dataset, split_episodes
from scd_robot.datasets.schema import row_blocks
from scd_robot.diffusion import SamplerConfig
from scd_robot.errors import ConfigError, ScdRobotError
from scd_robot.model import FrameModel, build_model
from scd_robot.output import write_json, write_text
from scd_robot.policies import load_imagination
from scd_robot.presets import frames_64, resolve, with_settings
from scd_robot.recording import record_demonstrations
from scd_robot.resizing import crop_and_resize
from scd_robot.training import train
from scd_robot.types import ArraySpec, DatasetSpec

PARTS = ("quality", "times")
ARMS = {
    "separable": (),
    "entangled": ("model.architecture=entangled", "model.context_corruption=0", "model.num_context_tokens=1"),
}
MORE_ARMS = {"self_forced": ("training.self_forcing.probability=0.5", "training.self_forcing.frames=8")}
ENVIRONMENT = "scd_memory/place-back:delay=10,observation=image"
CAMERA = "image"
CONTEXT, AHEAD = 16, 64  # frames
TOLD = (1, 4, 16, 64)  # frames ahead that the tables show
HISTORIES = (8, 16, 32, 64, 128, 256)
FOOT = 100  # of PushT's block, pixels from its origin
STEPS = 16
QUALITY = {  # by name of the metric: how tables call it, and digits
    "psnr_moving": ("PSNR of moving pixels [dB]", 2),
    "ssim_moving": ("SSIM of moving pixels", 3),
    "psnr": ("PSNR of all pixels [dB]", 2),
    "ssim": ("SSIM of all pixels", 3),
}


# --------------------------------------------------------------------------------------------------------- quality


def long_enough(data: EpisodeDataset, ahead: int) -> tuple[list[int], np.ndarray]:
    """Numbers of the N episodes with CONTEXT + `ahead` control steps, and the rows (N, Tf) of the frames to imagine.

    Raises:
        ConfigError: there are fewer than two.
    """
    episodes = np.flatnonzero(data.episode_lengths >= CONTEXT + ahead)
    if len(episodes) < 2:
        raise ConfigError(
            f"only {len(episodes)} of {data.num_episodes} episodes have {CONTEXT + ahead} control steps or more (the "
            f"longest {data.episode_lengths.max()}); choose a smaller --ahead or another --env"
        )
    starts = data.episode_ends[episodes] - data.episode_lengths[episodes]
    return episodes.tolist(), starts[:, None] + np.arange(CONTEXT, CONTEXT + ahead)


def moving_things(data: EpisodeDataset) -> dict[str, np.ndarray]:
    """Positions (N, 3) [m] by name, without what stands still in all episodes alike."""
    found = {key.removeprefix(POSITION): data.arrays[key][:] for key in data.arrays if key.startswith(POSITION)}
    return {name: values for name, values in found.items() if values.std(axis=0).max() > 1e-3}


def judge(out: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Records, trains the arms, and tells how their frames are."""
    if options.pusht is None:
        environment = options.env
        known = record(out, "train", environment, options.demonstrations, seed=0)
        unknown = record(out, "test", environment, options.episodes, seed=1)
    else:
        environment = "PushT, people's episodes (its 512 pixels taken as 51.2 cm)"
        data = pusht(options.pusht)
        known, unknown = map(data.select, split_episodes(data.num_episodes, options.episodes / data.num_episodes))
    episodes, rows = long_enough(unknown, options.ahead)
    trained = {arm: train_arm(out, arm, known, options) for arm in options.arms}
    owner = np.repeat(np.arange(known.num_episodes), known.episode_lengths)
    probe = train_probe(np.asarray(known.arrays[CAMERA][:]), moving_things(known), owner)
    positions = {name: unknown.arrays[POSITION + name][:][rows] for name in probe.widths}
    found, places = {}, {}
    for arm in options.arms:
        model = load_imagination(out / arm, num_denoising_steps=STEPS)
        seen = found[arm] = imagine_episodes(model, unknown, episodes, CONTEXT, options.ahead)
        frames = (seen.recorded, seen.imagined, seen.last_context)
        places[arm] = probe_errors(probe, positions, *frames, episodes=seen.errors.episodes)
        write_imagined(seen, out / arm / "imagined", 1 / unknown.spec.control_dt, describe(seen, model))

    def beside(arm: str) -> dict[str, Any]:
        ours, theirs = found["separable"].errors.imagined, found[arm].errors.imagined
        differences = {name: getattr(ours, name) - getattr(theirs, name) for name in QUALITY}
        ours, theirs = places["separable"].imagined, places[arm].imagined
        differences |= {f"{thing} [cm]": ours[thing] - theirs[thing] for thing in positions}
        return {name: curve(values, np.array(episodes)) for name, values in differences.items()}

    return {
        "environment": environment,
        "context": CONTEXT,
        "ahead": options.ahead,
        "control_dt": known.spec.control_dt,
        "training": trained,
        "frames": {arm: seen.errors.to_json() for arm, seen in found.items()},
        "positions": {arm: errors.to_json() for arm, errors in places.items()},
        **{f"separable_less_{arm}": beside(arm) for arm in options.arms if arm != "separable"},
    }


def pusht(path: Path) -> EpisodeDataset:
    """Diffusion Policy's replay buffer with pictures of 64 x 64, and where the hand, the block and its foot are."""
    data = open_dataset(path, ["img", "state"], control_dt=0.1)
    state = np.asarray(data.arrays["state"][:], np.float64)
    hand, block, angle = state[:, :2], state[:, 2:4], state[:, 4:]
    places = {"hand": hand, "block": block, "foot": block + FOOT * np.hstack([-np.sin(angle), np.cos(angle)])}
    height = np.zeros((len(state), 1))
    return replace(
        data,
        spec=replace(data.spec, observation={CAMERA: ArraySpec((64, 64, 3), "uint8")}),
        arrays={
            CAMERA: np.concatenate(
                [crop_and_resize(part, size=(64, 64)) for _, part in row_blocks(data.arrays["img"])]
            ),
            "action": data.arrays["action"],
        }
        | {POSITION + name: np.hstack([1e-3 * place, height]).astype(np.float32) for name, place in places.items()},
    )


def record(out: Path, name: str, environment: str, episodes: int, seed: int) -> EpisodeDataset:
    """The recording OUT/NAME.zarr, made where it is missing or was cut off."""
    store, summary = out / f"{name}.zarr", out / f"{name}.json"
    if not summary.is_file():  # without its summary a store is the rest of a recording that was killed
        noise = {"action_noise": 0.015, "disturbances": 0.02} if environment.startswith("scd_memory") else {}
        found = record_demonstrations(
            environment,
            episodes,
            store,
            seed=seed,
            keep_positions=True,
            overwrite=True,
            **({"action_noise": 0.1} | noise),
        )
        write_json(summary, found)
    told = read_json(summary)
    if (told["environment"], told["episodes"]) != (environment, episodes):
        raise ConfigError(
            f"{store} holds {told['episodes']} episodes of {told['environment']}, asked for {episodes} of "
            f"{environment}; choose another --out"
        )
    return open_dataset(store)


def train_arm(out: Path, arm: str, data: EpisodeDataset, options: argparse.Namespace) -> dict[str, Any]:
    """Trains an arm, or continues, or looks up what was told of it."""
    summary = out / arm / "training.json"
    settings = [*(ARMS | MORE_ARMS)[arm], *options.set]
    settings += [f"training.max_steps={options.max_steps}", f"training.seed={options.seed}"]
    if summary.is_file():
        told = dict(read_json(summary))
        if told["settings"] != settings:
            raise ConfigError(
                f"{out / arm} was trained with {told['settings']}, asked for {settings}; choose another --out"
            )
        return told
    data = data.with_keys([CAMERA])
    experiment = with_settings(resolve("frames_64", data.spec), settings)
    resumed = bool(list_checkpoints(out / arm))
    wall, cpu = time.monotonic(), time.process_time()
    found = train(data, experiment, out / arm, resume=resumed, accelerator="cpu")
    assert found is not None
    told = {name: found[name] for name in ("steps", "parameters", "metrics")}
    told |= {"cpu_s": None if resumed else time.process_time() - cpu}  # nobody measured a session that was killed
    told |= {"wall_s": None if resumed else time.monotonic() - wall, "settings": settings}
    write_json(summary, told)
    return told


# ----------------------------------------------------------------------------------------------------------- times


class Stream:
    """A model of frames in a full window: each turn one picture and action more, and the frame that follows."""

    def __init__(self, arm: str, history: int, seed: int = 0) -> None:
        spec = DatasetSpec({CAMERA: ArraySpec((64, 64, 3), "uint8")}, 3, 0.05, "benchmark")
        config = with_settings(frames_64(spec), list(ARMS[arm])).model
        torch.manual_seed(seed)
        model = build_model(replace(config, history_length=history)).eval()
        assert isinstance(model, FrameModel)
        self.model, self.cache = model, model.new_cache(1)
        self._sampler = SamplerConfig("euler", STEPS)
        self._conditioning = model.conditioning(self._sampler)
        rng = np.random.default_rng(seed)
        self._picture = torch.from_numpy(rng.integers(0, 256, (1, 64, 64, 3), np.uint8))
        self._action = torch.from_numpy(rng.uniform(-1, 1, (1, 3)).astype(np.float32))
        for _ in range(history):
            self.read()

    def read(self) -> None:
        """One control step more into the history."""
        past = self._action if self.model.config.past_action_input != "none" else None
        self.context = self.model.encode_step({CAMERA: self._picture}, self.cache, past_action=past)

    def denoise(self) -> None:
        """The next frame."""
        known = self.model.known(self._picture)
        tokens = self.model.imagine(
            self.context, self._action, known, sampler=self._sampler, conditioning=self._conditioning
        )
        self.model.frames(tokens, known)

    def operations(self) -> int:
        """Multiplications and additions of a frame, in products of matrices and in attention."""

        def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
            return int(sdpa_flop_count(query, key, value))  # of shapes

        unknown = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # to the counter
        with FlopCounterMode(display=False, custom_mapping={unknown: attention}) as counter:
            self.read()
            self.denoise()
        count: int = counter.get_total_flops()
        return count


@torch.inference_mode()
def time_frames(rounds: int, histories: Sequence[int] = HISTORIES) -> dict[str, Any]:
    """Milliseconds by arm and history, and ratios of the arms, in turns."""
    load = os.getloadavg()[0]
    machine = measure_machine()
    streams = {(arm, history): Stream(arm, history) for history in histories for arm in ARMS}
    floors = {key: stream.operations() / (1e6 * machine["gflops"]) for key, stream in streams.items()}
    times: dict[tuple[str, int], dict[str, list[float]]] = {}
    for index in range(rounds + rounds // 10):
        if index == rounds // 10:  # the first tenth warms up
            times = {key: {"read": [], "denoise": [], "frame": [], "cpu": []} for key in streams}
        for key, stream in streams.items():
            started = time.process_time()
            read, denoise = timed(stream.read), timed(stream.denoise)
            cpu = 1e3 * (time.process_time() - started)
            for name, value in (("read", read), ("denoise", denoise), ("frame", read + denoise), ("cpu", cpu)):
                times.get(key, {}).get(name, []).append(value)
    medians = {arm: [float(np.median(times[arm, w]["frame"])) for w in histories] for arm in ARMS}
    frame, cpu_time = ({key: found[name] for key, found in times.items()} for name in ("frame", "cpu"))
    first, last = min(histories), max(histories)
    return {
        "rounds": rounds,
        "denoising_steps": STEPS,
        "threads": torch.get_num_threads(),
        "load_1min_at_start": load,
        "parameters": {arm: sum(p.numel() for p in streams[arm, first].model.parameters()) for arm in ARMS},
        "ms": {
            arm: {str(w): {name: percentiles(times[arm, w][name]) for name in times[arm, w]} for w in histories}
            for arm in ARMS
        },
        "separable_over_entangled": {str(w): ratio_of(frame["separable", w], frame["entangled", w]) for w in histories},
        "growth": {arm: ratio_of(frame[arm, last], frame[arm, first]) for arm in ARMS},
        "cpu_separable_over_entangled": {
            str(w): ratio_of(cpu_time["separable", w], cpu_time["entangled", w]) for w in histories
        },
        "cpu_growth": {arm: ratio_of(cpu_time[arm, last], cpu_time[arm, first]) for arm in ARMS},
        "gflops": machine["gflops"],
        "floor_ms": {arm: {str(w): floors[arm, w] for w in histories} for arm in ARMS},
        "slope_us": {
            arm: {
                "measured": slope_us(histories, medians[arm]),
                "floor": slope_us(histories, [floors[arm, w] for w in histories]),
            }
            for arm in ARMS
        },
    }


def slope_us(histories: Sequence[int], ms: Sequence[float]) -> float:
    """Microseconds by which a frame takes longer per control step of history, of the least-squares line."""
    return 1e3 * float(np.polyfit(histories, ms, 1)[0])


# ---------------------------------------------------------------------------------------------------------- tables


def quality_report(found: Mapping[str, Any]) -> str:
    """Tables of `judge`."""
    ahead = sorted({frame for frame in TOLD if frame <= found["ahead"]} | {found["ahead"]})
    example = found["frames"]["separable"]
    others = [arm for arm in found["frames"] if arm != "separable"]
    lines = [
        f"{found['environment']}: {example['pieces']} episodes, {found['context']} frames seen, {found['ahead']} "
        f"imagined; a control step is {1e3 * found['control_dt']:g} ms. Mean and 95 % interval over episodes.\n",
        _head("", *(f"+{frame}" for frame in ahead), "drift per frame"),
    ]
    for name, (title, digits) in QUALITY.items():
        rows = {arm: (found["frames"][arm][name], "imagined") for arm in found["frames"]}
        rows["last frame repeated"] = (example[name], "copied")
        for arm, (entry, which) in rows.items():
            drift = _cell(entry["drift"][which]["per_frame"], entry["drift"][which]["interval"], digits + 1)
            lines.append(_row(f"{title}: {arm}", *_cells(entry[which], ahead, digits), drift))
        for arm in others:
            difference = found[f"separable_less_{arm}"][name]
            lines.append(_row(f"{title}: separable - {arm}", *_cells(difference, ahead, digits), ""))
    lines += ["", _head("distance from where it was [cm]", *(f"+{frame}" for frame in ahead))]
    for thing, seen in found["positions"]["separable"]["positions"].items():
        for arm in found["positions"]:
            entry = found["positions"][arm]["positions"][thing]["imagined"]
            lines.append(_row(f"{thing}: {arm}", *_cells(entry, ahead, 1)))
        lines.append(_row(f"{thing}: last frame repeated", *_cells(seen["copied"], ahead, 1)))
        lines.append(_row(f"{thing}: recorded frames (the probe's own error)", *_cells(seen["recorded"], ahead, 1)))
        lines.append(_row(f"{thing}: the mean position, without looking", *_cells(seen["guessed"], ahead, 1)))
        for arm in others:
            difference = found[f"separable_less_{arm}"][f"{thing} [cm]"]
            lines.append(_row(f"{thing}: separable - {arm}", *_cells(difference, ahead, 1)))
    lines += ["", _head("training", "updates", "parameters", "CPU s", "held-out metrics")]
    for arm, told in found["training"].items():
        cpu = "not known" if told["cpu_s"] is None else f"{told['cpu_s']:.0f}"
        metrics = ", ".join(f"{name} {value:.4g}" for name, value in told["metrics"].items())
        lines.append(_row(arm, str(told["steps"]), f"{told['parameters']:,}", cpu, metrics))
    return "\n".join(lines)


def times_report(found: Mapping[str, Any]) -> str:
    """Tables of `time_frames`."""
    names = ("history", "arm", "picture and action into the history", "denoising", "frame", "separable / entangled")
    names += ("CPU of a frame, p50", "separable / entangled, CPU", "floor", "frame / floor")
    lines = [
        f"{found['denoising_steps']} denoising steps, {found['threads']} thread(s), load average at the start "
        f"{found['load_1min_at_start']:.2f}; ms, p50 / p99\n",
        _head(*names),
    ]
    for history, beside in found["separable_over_entangled"].items():
        for arm in ARMS:
            entry = found["ms"][arm][history]
            cells = [f"{entry[n]['p50']:.1f} / {entry[n]['p99']:.1f}" for n in ("read", "denoise", "frame")]
            cells += [_ratio(beside) if arm == "separable" else "", f"{entry['cpu']['p50']:.1f}"]
            cells += [_ratio(found["cpu_separable_over_entangled"][history]) if arm == "separable" else ""]
            floor = found["floor_ms"][arm][history]
            lines.append(_row(history, arm, *cells, f"{floor:.2f}", f"{entry['frame']['p50'] / floor:.1f}"))
    histories = list(found["separable_over_entangled"])
    lines.append("")
    for arm, growth in found["growth"].items():
        lines.append(
            f"- {arm}: a frame with a history of {histories[-1]} over {histories[0]}: {_ratio(growth)}, CPU "
            f"{_ratio(found['cpu_growth'][arm])}"
        )
    for arm, slope in found["slope_us"].items():
        told = f"{slope['measured']:.1f} us per control step of history, of the floor {slope['floor']:.1f}"
        lines.append(f"- {arm}, slope: {told} (at {found['gflops']:.0f} GFLOP/s)")
    lines.append("- parameters: " + ", ".join(f"{arm} {count:,}" for arm, count in found["parameters"].items()))
    return "\n".join(lines)


def _ratio(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f} ({found['p5']:.2f}-{found['p95']:.2f})"


def _cells(entry: Mapping[str, Sequence[Any]], ahead: Sequence[int], digits: int) -> list[str]:
    return [_cell(entry["mean"][frame - 1], entry["interval"][frame - 1], digits) for frame in ahead]


def _cell(mean: float | None, interval: Sequence[float] | None, digits: int) -> str:
    if mean is None:
        return "-"
    around = "" if interval is None else f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]"
    return f"{mean:.{digits}f}{around}"


def _head(*cells: str) -> str:
    return _row(*cells) + "\n|" + "---|" * len(cells)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


# ---------------------------------------------------------------------------------------------------- command line


def main() -> int:
    """Does what the command line asks for; the exit code is 2 for bad input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/frames"), help="folder (default %(default)s)")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run")
    parser.add_argument("--report", action="store_true", help="print the tables of what is done, run nothing")
    parser.add_argument("--env", default=ENVIRONMENT, help="with pictures and an expert (default %(default)s)")
    parser.add_argument(
        "--pusht", type=Path, help="replay buffer of PushT: nothing is recorded, --episodes are held out"
    )
    parser.add_argument("--demonstrations", type=int, default=300, help="episodes to train on")
    parser.add_argument("--episodes", type=int, default=50, help="episodes to judge by")
    parser.add_argument("--ahead", type=int, default=AHEAD, help="frames to imagine (default %(default)s)")
    parser.add_argument("--max-steps", type=int, default=4000, help="updates of each training (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the trainings")
    parser.add_argument("--threads", type=int, default=1, help="of the trainings; times are always of one")
    parser.add_argument("--rounds", type=int, default=50, help="turns of every configuration that is timed")
    parser.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="more settings for all arms")
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=[*ARMS, *MORE_ARMS],
        default=list(ARMS),
        help="of the quality, separable among them (default %(default)s)",
    )
    options = parser.parse_args()
    if "separable" not in options.arms:
        parser.error("--arms must name separable, which the others stand beside")
    path = options.out / "frames.json"
    try:
        parts = dict(read_json(path)["parts"]) if path.is_file() else {}
        for part in () if options.report else options.only:
            torch.set_num_threads(options.threads if part == "quality" else 1)
            found = judge(options.out, options) if part == "quality" else time_frames(options.rounds)
            parts[part] = {"found": found, "provenance": _provenance()}
            write_json(path, {"parts": parts})
    except ScdRobotError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    reports = {"quality": quality_report, "times": times_report}
    texts = [f"{reports[part](entry['found'])}\n\n{_origin(entry['provenance'])}" for part, entry in parts.items()]
    text = "\n\n".join(texts) or "Nothing is done yet."
    if texts:
        write_text(options.out / "report.md", text + "\n")
    print(text)
    return 0


def _provenance() -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
        "code": code_version(),
        "machine": describe_machine(),
        "torch": torch.__version__,
    }


def _origin(found: Mapping[str, Any]) -> str:
    machine = found["machine"]
    return (
        f"- {machine['cpu']}, {machine['cores']} cores, load {machine['load_1min']}; torch {found['torch']}; code "
        f"{found['code']}; {found['date']}\n- command: `{found['command']}`"
    )


if __name__ == "__main__":
    sys.exit(main())
