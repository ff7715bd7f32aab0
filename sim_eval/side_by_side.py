"""Videos of the start states that tell two policies apart, replayed from the actions that evaluations keep."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scd_robot.errors import OutputError, ScdRobotError, UnknownNameError
from scd_robot.sim_eval.comparison import Comparison
from scd_robot.sim_eval.result import EpisodeRecord
from scd_robot.sim_eval.video import ReplayError, film
from scd_robot.sim_eval.workers import EnvironmentWorker, close_workers, start_workers
from scd_robot.types import ActionArray

__all__ = ["film_pairs"]

Videos = dict[int, Path]  # by episode


def film_pairs(
    comparison: Comparison,
    documents: Sequence[Mapping[str, Any]],
    actions: Sequence[Mapping[int, ActionArray]],
    out: Path,
    most: int,
    *,
    environment: str | None = None,
    python: str | None = None,
    size: tuple[int, int] = (256, 256),
) -> tuple[tuple[Videos, Videos], str | None]:
    """Films start states that only one arm solved, both arms each, into the folder `videos`.

    Args:
        comparison: of the two arms.
        documents: `result.json` of the first evaluation of either arm.
        actions: (steps, Da) by episode, of the same evaluations.
        out: folder of the comparison.
        most: start states.
        environment: name under which it is made; None = as the evaluations call it.
        python: interpreter of another environment, as in `evaluate`.
        size: height and width.

    Returns:
        Videos of A and of B by episode, and why some are missing, in one line (None if none are).
    """
    episodes = [int(comparison.indices[column]) for column in comparison.discordant(most)]
    told = [episode for episode in episodes if all(episode in arm for arm in actions)]
    if not told:
        return ({}, {}), "no videos: these evaluations did not keep their actions" if episodes else None
    problems: list[str] = []
    videos: tuple[Videos, Videos] = ({}, {})
    workers: list[EnvironmentWorker] = []
    try:
        (out / "videos").mkdir(parents=True, exist_ok=True)
        workers = start_workers(environment or comparison.environment, 1, python=python)
        for arm, document in enumerate(documents):
            records = {record["index"]: record for record in document["episodes_detail"]}
            for episode in told:
                record = EpisodeRecord.from_json(records[episode])
                path = out / "videos" / f"episode_{episode:05d}_{'ab'[arm]}.mp4"
                try:
                    film(workers[0], record, actions[arm][episode], path, size)
                except ReplayError as error:
                    problems.append(f"episode {episode} of {'AB'[arm]} has no video: {error}")
                else:
                    videos[arm][episode] = path
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {out / 'videos'}: {error.strerror or error}") from error
    except ScdRobotError as error:  # the simulator is not here, or does not render: the numbers stand without it
        unnamed = environment is None and isinstance(error, UnknownNameError)
        problems.append(f"no (more) videos: {error}" + ("; tell with --env how it is made" if unnamed else ""))
    finally:
        close_workers(workers)
    return videos, "; ".join(problems) or None
