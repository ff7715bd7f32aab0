"""What computes a control step fastest: eager torch, compiled torch, ONNX Runtime, AOTInductor.

    python benchmarks/control.py                          10,000 ticks of every arm, and runs/benchmarks/control.json
    python benchmarks/control.py --ticks 200              quicker, wider spread
    python benchmarks/control.py --pace 10                each arm drives a loop of 100 Hz for ten minutes
    python benchmarks/control.py --device cuda            eager, and compiled with CUDA graphs, on a GPU

float32, one thread, batch 1, NFE 8, the preset metaworld_state with random weights, through `observe` and `plan` with
numpy in and out: checks and copies are included. All arms see the same observations in turns whose order is drawn, so
that other load on the machine meets them alike. A tick observes and plans; the ratio to eager is that of the medians,
with 5 to 95 % of the single turns'. The floor is that of benchmarks/latency.py, on one thread. Times are of the wall
clock (time.perf_counter). Arms whose tools are missing (a C++ compiler, the extra [export]) are left out, and named.

With --pace every arm in turn has a loop to itself: `act` in each control step, which plans in every `num_executed`-th;
a miss is a step whose action came after the next step was due, or that was left out for it. Each is recorded.

Compiling is most of the work: about 40 s of CPU for the first graph, which on a machine that is busy otherwise is a
quarter of an hour. What it costs is told on standard error graph by graph; what is done is kept in --keep, so that a
run which was ended goes on from there. Exports of another commit, or of changes since, are not used.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import importlib.util
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import code_version, describe_machine, result_file
from latency import floor_ms, make_policy, measure_machine, observation, timed

from scd_robot.control.clock import Clock, MonotonicClock, Pacer
from scd_robot.export import is_export, load_exported
from scd_robot.export.policy import ExportedPolicy
from scd_robot.export.write import export_policy, make_graphs, manifest_of
from scd_robot.output import write_json
from scd_robot.policies.chunked import ChunkPolicy
from scd_robot.policies.scd import ScdPolicy

ARMS = ("eager", "compiled", "onnx", "aoti")
NAMES = ("encoder step", "plan", "planning tick")
QUANTILES = (50, 95, 99, 99.9)
RATE_HZ, STEPS = 100.0, 8
AGREE = 1e-3  # actions, in units of half their range

Times = dict[str, dict[str, list[float]]]


@contextlib.contextmanager
def told_on_stderr(what: str) -> Iterator[None]:
    """What is done, and what it cost: a machine without time for it must not look like one that hangs."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    began_s, began_cpu = time.monotonic(), sum(os.times()[:4])
    yield
    cpu_s = sum(os.times()[:4]) - began_cpu
    print(f"{what}: {time.monotonic() - began_s:.0f} s, {cpu_s:.0f} s of CPU", file=sys.stderr, flush=True)


class CompiledRuntime:
    """The graphs' modules behind torch.compile; on a GPU as CUDA graphs.

    Args:
        made: by `make_graphs`, on the CPU; moved.
        device: where they are computed.
    """

    def __init__(self, made: Mapping[str, Any], device: str = "cpu") -> None:
        self._made, self._device = made, torch.device(device)
        mode = None if self._device.type == "cpu" else "reduce-overhead"
        self._calls = {
            name: torch.compile(module.to(self._device), dynamic=False, mode=mode)
            for name, (module, *_) in made.items()
        }
        for name, (_, names, example, _) in made.items():  # now, and not in the middle of what is measured
            inputs = {key: value.numpy() for key, value in zip(names, example, strict=True)}
            with told_on_stderr(f"compiling {name}"):
                self.run(name, inputs)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name."""
        _, names, _, outputs = self._made[graph]
        with torch.no_grad():
            found = self._calls[graph](*(torch.from_numpy(inputs[name]).to(self._device) for name in names))
        tensors = found if isinstance(found, tuple) else (found,)
        return {name: tensor.cpu().numpy() for name, tensor in zip(outputs, tensors, strict=True)}


def make_arms(
    names: tuple[str, ...], history: int, folder: Path, device: str = "cpu"
) -> tuple[dict[str, ChunkPolicy], dict[str, str]]:
    """The policy of each arm, and why arms are left out."""
    torch.manual_seed(0)  # before the weights are drawn: what `--keep` holds is compared with them again
    eager = make_policy(history, STEPS)
    with torch.no_grad():  # a model that was never trained plans its noise, whoever computes it
        for parameter in eager.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    compiler = "" if shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    tools = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    reasons = {"compiled": compiler, "aoti": compiler, "onnx": f"no {', '.join(tools)}" if tools else ""}
    if torch.device(device).type != "cpu":
        reasons |= dict.fromkeys(("onnx", "aoti"), "exports are for the CPU")
    makers: dict[str, Callable[[], ChunkPolicy]] = {
        "eager": lambda: _copied(eager, device),
        "compiled": lambda: _compiled(eager, device),
        "onnx": lambda: _exported(eager, "onnx", folder / "onnx"),
        "aoti": lambda: _exported(eager, "aoti", folder / "aoti"),
    }
    left_out = {name: reason for name, reason in reasons.items() if reason and name in names}
    arms: dict[str, ChunkPolicy] = {}
    for name in names:
        if name not in left_out:
            with told_on_stderr(f"making {name}"):
                arms[name] = makers[name]()
    return arms, left_out


def _copied(policy: ScdPolicy, device: str) -> ScdPolicy:
    """With weights of its own, there."""
    dataset = policy.transforms.dataset
    return type(policy)(copy.deepcopy(policy.model), policy.normalizer, dataset, policy.config, device)


def _compiled(policy: ScdPolicy, device: str) -> ExportedPolicy:
    policy = _copied(policy, "cpu")
    made = make_graphs(policy, 1)
    manifest = manifest_of(policy, made, "aoti", 1)
    return ExportedPolicy(CompiledRuntime(made, device), manifest, "compiled")


def _exported(policy: ScdPolicy, kind: Any, folder: Path) -> ExportedPolicy:
    if not is_export(folder):  # which it is only once it is complete
        export_policy(policy, folder, kind, tolerance=0)
    return load_exported(folder, trusted=True)


def exports_folder(keep: Path, history: int) -> Path | None:
    """Where exports of this code, torch and history lie from one run to the next; None where the code has changes."""
    code = code_version()
    if code == "unknown" or code.endswith("-dirty"):
        return None
    return keep / f"{code}_torch-{torch.__version__}_history-{history}_nfe-{STEPS}"


def take_turns(arms: Mapping[str, ChunkPolicy], observe: Callable[[], Any], ticks: int) -> Times:
    """Milliseconds of every arm, by the names in `NAMES`; windows are full, and the first tenth is dropped."""
    rng, names = np.random.default_rng(2), list(arms)
    for policy in arms.values():
        policy.reset(episodes=[0])
        for _ in range(policy.spec.history_length):
            policy.observe(observe())
    times: Times = {name: {part: [] for part in NAMES} for name in arms}
    for index in range(ticks + ticks // 10):
        seen = observe()
        for name in rng.permutation(names):
            policy = arms[name]
            encoder, plan = timed(lambda policy=policy, seen=seen: policy.observe(seen)), timed(policy.plan)
            if index >= ticks // 10:
                for part, value in zip(NAMES, (encoder, plan, encoder + plan), strict=True):
                    times[name][part].append(value)
    return times


def worst_difference(arms: Mapping[str, ChunkPolicy], observe: Callable[[], Any]) -> dict[str, float]:
    """Largest difference of the arms' actions from the first one's in 30 control steps, with the same noise."""
    seen = [observe() for _ in range(30)]
    actions = {}
    for name, policy in arms.items():
        policy.reset(episodes=[0])
        actions[name] = np.stack([policy.act(one) for one in seen])
    first = next(iter(actions.values()))
    return {name: float(np.abs(found - first).max()) for name, found in actions.items()}


def pace(policy: ChunkPolicy, observe: Callable[[], Any], minutes: float, clock: Clock | None = None) -> dict[str, Any]:
    """Drives a loop of `RATE_HZ` for so long; each miss with its step, what it took and how late it came [ms]."""
    clock = clock or MonotonicClock()
    period, durations, misses = 1 / RATE_HZ, [], []
    policy.reset(episodes=[0])
    for _ in range(policy.spec.history_length):
        policy.act(observe())
    pacer, step, before = Pacer(clock, period), -1, -1
    while step < 60 * minutes * RATE_HZ - 1:
        step = pacer.wait()
        misses += [{"step": lost, "left_out": True} for lost in range(before + 1, step)]
        began, began_late, seen = clock.now(), pacer.lateness_s, observe()
        policy.act(seen)
        duration = 1e3 * (clock.now() - began)
        durations.append(duration)
        late = pacer.lateness_s - period
        if late > 0:
            planned = policy.planned is not None and bool(policy.planned.any())
            told = {"duration_ms": duration, "late_ms": 1e3 * late, "began_late_ms": 1e3 * began_late}
            misses.append({"step": step, "left_out": False, "planned": planned, **told})
        before = step
    return {
        "minutes": minutes,
        "rate_hz": RATE_HZ,
        "control_steps": step + 1,
        "missed": len(misses),
        "control_step_ms": {**quantiles(durations), "worst": max(durations)},
        "pacing": pacer.report(),
        "misses": misses,
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """p50, p95, p99 and p99.9."""
    return {f"p{q:g}": float(np.percentile(values, q)) for q in QUANTILES}


def summary(times: Times, floors: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """By arm and part: quantiles, the floor and the distance from it, and the ratio to eager."""
    rows: dict[str, dict[str, Any]] = {}
    for arm, parts in times.items():
        rows[arm] = {}
        for part, values in parts.items():
            found: dict[str, Any] = quantiles(values)
            found |= {"floor": floors[part], "over_floor": found["p50"] / floors[part]}
            if "eager" in times:
                eager = times["eager"][part]
                low, high = np.percentile(np.array(values) / np.array(eager), (5, 95))
                found["over_eager"] = {
                    "medians": float(np.median(values) / np.median(eager)),
                    "p5": float(low),
                    "p95": float(high),
                }
            rows[arm][part] = found
    return rows


def show(rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One Markdown table."""
    head = ("arm", "part", "p50", "p95", "p99", "p99.9", "floor", "p50 / floor", "over eager (5-95 %)")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for arm, parts in rows.items():
        for part, found in parts.items():
            cells = [f"{found[f'p{q:g}']:.2f}" for q in QUANTILES] + [f"{found['floor']:.3f}"]
            cells.append(f"{found['over_floor']:.1f}")
            beside = found.get("over_eager")
            cells.append("" if beside is None else f"{beside['medians']:.2f} ({beside['p5']:.2f}-{beside['p95']:.2f})")
            print(f"| {arm} | {part} | " + " | ".join(cells) + " |")


def show_paced(paced: Mapping[str, Mapping[str, Any]]) -> None:
    """One Markdown table of the loops."""
    head = ("arm", "control steps", "missed", *(f"p{q:g}" for q in QUANTILES), "worst")
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for arm, found in paced.items():
        cells = " | ".join(f"{value:.2f}" for value in found["control_step_ms"].values())
        print(f"| {arm} | {found['control_steps']} | {found['missed']} | {cells} |")


def main() -> int:
    """Measures, prints the tables and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ticks", type=int, default=10_000, help="turns of every arm; 0 = none")
    parser.add_argument("--history", type=int, default=128, help="control steps that each encoder layer attends to")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--device", default="cpu", help="of the arms, such as cuda (default %(default)s)")
    parser.add_argument("--pace", type=float, default=0.0, metavar="MINUTES", help="of a loop of 100 Hz, for each arm")
    parser.add_argument("--out", type=result_file, default="runs/benchmarks/control.json")
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/benchmarks/control_graphs"), help="folder of what was compiled"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    load, started = os.getloadavg()[0], time.time()
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(options.keep.resolve() / "inductor"))
    with tempfile.TemporaryDirectory() as folder:
        exports = exports_folder(options.keep, options.history) or Path(folder)
        arms, left_out = make_arms(tuple(options.arms), options.history, exports, options.device)
        observe = partial(observation, np.random.default_rng(0))
        difference, machine = worst_difference(arms, observe), measure_machine(options.device)
        floors = floor_ms(make_policy(options.history, STEPS).model.config, STEPS, machine)
        floors["planning tick"] = floors["encoder step"] + floors["plan"]
        print(
            f"load average at the start: {load:.2f}; torch {torch.__version__}; history {options.history}, NFE {STEPS}"
        )
        where = "one thread" if options.device == "cpu" else options.device
        print(f"{where}: {machine['gflops']:.0f} GFLOP/s, {machine['gb_per_s']:.1f} GB/s; times in ms\n")
        rows = summary(take_turns(arms, observe, options.ticks), floors) if options.ticks else {}
        show(rows)
        paced = {name: pace(policy, observe, options.pace) for name, policy in arms.items() if options.pace}
    if paced:
        print(f"\n{RATE_HZ:g} Hz for {options.pace:g} minutes, {STEPS} denoising steps\n")
        show_paced(paced)
    told = ", ".join(f"{name} {value:.1e}" for name, value in difference.items())
    print(f"\nlargest difference of actions from {next(iter(arms))}: {told}")
    for name, reason in left_out.items():
        print(f"left out: {name} ({reason})")
    versions = {name: _version(name) for name in ("torch", "onnxruntime", "numpy")}
    write_json(
        options.out,
        {
            "date": datetime.date.today().isoformat(),
            "command": " ".join(["python", *sys.argv]),
            "code": code_version(),
            "machine": {**machine, **describe_machine(), "device": options.device, "load_1min_at_start": load},
            "versions": versions,
            "history": options.history,
            "num_denoising_steps": STEPS,
            "ticks": options.ticks,
            "arms": rows,
            "paced": paced,
            "difference": difference,
            "left_out": left_out,
            "wall_s": time.time() - started,
        },
    )
    print(f"written: {options.out}")
    strangers = [name for name, value in difference.items() if value > AGREE]
    if strangers:
        print(f"these arms compute something else than {next(iter(arms))}: {', '.join(strangers)}", file=sys.stderr)
    return 1 if strangers else 0


def _version(name: str) -> str | None:
    return importlib.metadata.version(name) if importlib.util.find_spec(name) is not None else None


if __name__ == "__main__":
    sys.exit(main())
