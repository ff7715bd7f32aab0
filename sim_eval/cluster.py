"""Evaluations on a Ray cluster, for sweeps that one machine is too small for: START HERE at `evaluate_on_cluster`.

An evaluation is cut into shards of consecutive episodes, each of which is an ordinary `evaluate` on some node. Start
states and noise follow from the number of the episode, so it does not matter where it runs: with the same number of
environments side by side and the same kind of CPU the outcome is bitwise that of one machine. A shard whose node dies
is run again elsewhere. Ray sends Python objects between its own processes by pickle: connect to clusters you trust.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import scd_robot
from scd_robot.errors import ConfigError, MissingDependencyError, ScdRobotError, SimulatorError
from scd_robot.sim_eval.jobs import EvaluationJob
from scd_robot.sim_eval.result import EvaluationResult, join_results
from scd_robot.sim_eval.rollout import evaluate

__all__ = ["connect", "evaluate_on_cluster"]

logger = logging.getLogger(__name__)

_ATTEMPTS = 4  # at a shard whose node or process dies
_SHARD_EPISODES = 20  # at least; starting simulators costs a few seconds
_NUM_ENVS = 4  # on a node, unless the job says otherwise


def connect(address: str) -> Any:
    """Joins a running cluster, unless this process has joined one already.

    Args:
        address: of its head, as `ray.init` takes it: "auto" for the cluster this machine belongs to, "ray://host:10001"
            for a distant one; "local" starts one on this machine.

    Returns:
        The module `ray`.

    Raises:
        MissingDependencyError: Ray is not installed.
        SimulatorError: there is no cluster at that address.
    """
    try:
        import ray
    except ImportError as error:
        raise MissingDependencyError("clusters need Ray: pip install 'scd_robot[ray]'") from error
    if not ray.is_initialized():
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except Exception as error:  # a bare one where its processes take longer than it waits for them
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise SimulatorError(
                f"no Ray cluster answers at {address!r} ({reason}); start one with 'ray start --head'"
            ) from error
    return ray


def evaluate_on_cluster(
    jobs: Sequence[EvaluationJob],
    address: str,
    progress: bool = True,
    on_shard: Callable[[int, EvaluationResult], None] | None = None,
) -> Iterator[tuple[int, EvaluationResult | Exception]]:
    """Evaluates in closed loop on the nodes of a cluster.

    A shard asks for one CPU and uses it: its simulators, in one process, wait while its policy works, and the reverse.

    Args:
        jobs: what to evaluate; all shards of all jobs are handed out at once. Their outputs are not written.
        address: see `connect`.
        progress: shows a progress bar over episodes.
        on_shard: told of each shard as it ends, with the number of its job.

    Yields:
        Number and result of each job, as they are finished. Of a result `wall_s` is the time since the beginning. A job
        that failed has an error in the place of a result: what `evaluate` raised on a node, whatever it is, or
        SimulatorError where a shard's process died several times over. The others go on.

    Raises:
        MissingDependencyError, SimulatorError: see `connect`.
    """
    from tqdm import tqdm

    ray = connect(address)
    started = time.perf_counter()
    task = ray.remote(_evaluate_shard)
    places: dict[Any, tuple[int, range]] = {}
    done: list[list[EvaluationResult]] = [[] for _ in jobs]
    for number, job in enumerate(jobs):
        shared = ray.put(job)
        for episodes in _shards(job):
            shard = task.options(num_cpus=1, max_retries=_ATTEMPTS - 1).remote(shared, episodes, scd_robot.__version__)
            places[shard] = number, episodes
    try:
        total = sum(job.episodes for job in jobs)
        with tqdm(total=total, desc="evaluating", unit="episode", disable=not progress) as bar:
            while places:
                ready, _ = ray.wait(list(places), num_returns=1)
                number, episodes = places.pop(ready[0])
                bar.update(len(episodes))
                try:
                    result = _fetch(ray, ready[0], episodes)
                except Exception as error:  # whatever it is, the other jobs go on
                    for shard in [shard for shard, (other, _) in places.items() if other == number]:
                        ray.cancel(shard, force=True)
                        bar.update(len(places.pop(shard)[1]))
                    yield number, error
                    continue
                if on_shard is not None:
                    on_shard(number, result)
                done[number].append(result)
                if len(done[number]) == len(_shards(jobs[number])):
                    yield number, join_results(done[number], time.perf_counter() - started)
                    done[number] = []  # a sweep need not hold them all
    finally:
        for shard in places:
            ray.cancel(shard, force=True)


def _shards(job: EvaluationJob) -> list[range]:
    """Consecutive episodes for one node each; none has fewer than there are rows, unless there are no more in all."""
    count = max(1, job.episodes // max(job.num_envs or _NUM_ENVS, _SHARD_EPISODES))
    bounds = [job.first_episode + job.episodes * i // count for i in range(count + 1)]
    return [range(low, high) for low, high in itertools.pairwise(bounds)]


def _evaluate_shard(job: EvaluationJob, episodes: range, version: str) -> EvaluationResult:
    """Runs on a node."""
    if scd_robot.__version__ != version:
        raise ConfigError(
            f"a node of the cluster has scd_robot {scd_robot.__version__}, and {version} was expected; install that"
        )
    return evaluate(
        job.make_policy(),
        job.environment,
        len(episodes),
        first_episode=episodes.start,
        num_envs=job.num_envs or _NUM_ENVS,
        processes=1,
        max_steps=job.max_steps,
        policy_name=job.policy_name,
        faults=job.faults,
        progress=False,
    )


def _fetch(ray: Any, reference: Any, episodes: range) -> EvaluationResult:
    where = f"episodes {episodes.start} to {episodes.stop - 1}"
    try:
        result: EvaluationResult = ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ScdRobotError):
            raise error.cause from None
        if isinstance(error.cause, ImportError):
            raise SimulatorError(f"a node cannot run {where}: {error.cause}; install it there") from error
        raise error.cause from error  # which holds the node's traceback
    except ray.exceptions.RayError as error:
        raise SimulatorError(f"{where} were lost {_ATTEMPTS} times: {str(error).splitlines()[0]}") from error
    return result
