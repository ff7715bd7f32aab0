"""Checkpoints to and from the Hugging Face Hub: safetensors, JSON and a model card in Markdown, and nothing else.

What is downloaded is one commit, is checked as any checkpoint is (SHA-256 of each file, no pickle), and is there
complete or not at all. Tokens are huggingface_hub's affair (`hf auth login`, or the variable HF_TOKEN).
"""

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from scd_robot.checkpoint import PUBLISHED_FILES, Checkpoint, read_checkpoint
from scd_robot.errors import CheckpointError, ConfigError, MissingDependencyError, OutputError

__all__ = ["Published", "download", "model_card", "upload"]

logger = logging.getLogger(__name__)

CARD = "README.md"
_HARMLESS = (".safetensors", ".json", ".md")
_GIT_FILES = (".gitattributes", ".gitignore")  # the Hub's own; never downloaded
_REPOSITORY = re.compile(r"(\w|\w[\w.-]*\w)/(\w|\w[\w.-]*\w)", re.ASCII)
_CLIENTS = ("huggingface_hub", "httpx", "requests")  # httpx2 as well


@dataclass(frozen=True)
class Published:
    """A checkpoint on the Hub.

    Attributes:
        repo_id: OWNER/NAME.
        commit: what it is exactly.
    """

    repo_id: str
    commit: str


def upload(path: str | Path, repo_id: str, *, private: bool = False, message: str = "") -> Published:
    """Uploads a checkpoint, without its training state and with a model card, as one commit.

    Args:
        path: a checkpoint's folder, or a training run's (its newest checkpoint).
        repo_id: OWNER/NAME; made if it is not there. A checkpoint in it stays in its history.
        private: of a new repository.
        message: of the commit; empty = the step.

    Raises:
        ConfigError: `repo_id` is no name of a repository.
        CheckpointError: `path` is no sound checkpoint, the repository holds other things, or it cannot be reached.
        MissingDependencyError: huggingface_hub is not installed.
    """
    _check_repository(repo_id)
    checkpoint, api = read_checkpoint(path), _api()
    with TemporaryDirectory() as folder:
        for name in PUBLISHED_FILES:
            shutil.copyfile(checkpoint.path / name, Path(folder, name))
        Path(folder, CARD).write_text(model_card(checkpoint, repo_id), encoding="utf-8")
        with _reaching(repo_id):
            api.create_repo(repo_id, repo_type="model", private=private, exist_ok=True)
            _check_names(repo_id, api.list_repo_files(repo_id, repo_type="model"))
            done = api.upload_folder(
                repo_id=repo_id,
                repo_type="model",
                folder_path=folder,
                commit_message=message or f"Step {checkpoint.step} of {checkpoint.config['preset']}",
            )
    return Published(repo_id, str(done.oid))


def download(repo_id: str, out: str | Path, *, revision: str | None = None) -> Published:
    """Downloads a checkpoint into a folder of its own.

    Args:
        repo_id: OWNER/NAME.
        out: must not exist.
        revision: commit, tag or branch; None = the newest commit of the main branch. Whichever it is, all files are
            those of one commit.

    Returns:
        With the commit it was: give it as `revision` to have exactly this again.

    Raises:
        ConfigError: `repo_id` is no name of a repository.
        CheckpointError: there is no such repository or revision, it cannot be reached, it holds anything that is not
            safetensors, JSON or Markdown, or it is no sound checkpoint.
        OutputError: `out` exists or cannot be written.
        MissingDependencyError: huggingface_hub is not installed.
    """
    _check_repository(repo_id)
    target, api = Path(out), _api()
    if target.exists():
        raise OutputError(f"{target} exists already; choose another --out")
    with _reaching(repo_id, revision):
        commit = str(api.repo_info(repo_id, repo_type="model", revision=revision).sha)
        names = api.list_repo_files(repo_id, repo_type="model", revision=commit)
    _check_names(repo_id, names)
    missing = [name for name in PUBLISHED_FILES if name not in names]
    if missing:
        raise CheckpointError(
            f"{repo_id} at {commit[:12]} is no checkpoint of scd_robot: it lacks {', '.join(missing)}"
        )
    beside = target.with_name(f".{target.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        for name in (*PUBLISHED_FILES, *(name for name in (CARD,) if name in names)):
            with _reaching(repo_id, revision), TemporaryDirectory() as folder:
                file = api.hf_hub_download(repo_id, name, repo_type="model", revision=commit, local_dir=folder)
                shutil.copyfile(file, beside / name)
        read_checkpoint(beside)
        beside.rename(target)
    except OSError as error:
        raise OutputError(f"cannot write {target}: {error.strerror or error}; choose another --out") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return Published(repo_id, commit)


def model_card(checkpoint: Checkpoint, repo_id: str) -> str:
    """README.md of a checkpoint: what its files say, and how to use it."""
    dataset, model, policy = checkpoint.dataset, checkpoint.config["model"], checkpoint.config["policy"]
    sampler, versions = policy["sampler"], checkpoint.versions
    parameters = sum(tensor.numel() for tensor in checkpoint.weights.values())
    observations = [
        f"| `{key}` | {tuple(spec.shape)} {spec.dtype} |" for key, spec in sorted(dataset.observation.items())
    ]
    metrics = [f"| {name} | {'-' if value is None else f'{value:.5g}'} |" for name, value in checkpoint.metrics.items()]
    kind = f", {dataset.action_kind}" if dataset.action_kind else ""
    lines = [
        "---",
        "library_name: scd_robot",
        "pipeline_tag: robotics",
        "tags: [robotics, imitation-learning, diffusion-policy, scd_robot]",
        "---",
        f"# {repo_id.rpartition('/')[2]}",
        "",
        f"A robot policy of type `{checkpoint.policy}` (Separable Causal Diffusion, `scd_robot`): preset "
        f"`{checkpoint.config['preset']}`, step {checkpoint.step}, {parameters:,} parameters.",
        "",
        f"- trained on: {dataset.source or 'unknown source'}, a control step every {dataset.control_dt:g} s",
        f"- action: {dataset.action_dim} numbers{kind}",
        f"- history: {model['history_length']} observations per encoder layer, one every {model['history_stride']} "
        f"control steps; {model['encoder_layers']} layers",
        f"- plan: {model['chunk_length']} actions, {policy['num_executed']} executed, "
        f"{sampler['num_denoising_steps']} {sampler['solver']} steps",
        "",
        "| observation | shape |",
        "|---|---|",
        *observations,
        "",
        *(["| metric of training | |", "|---|---|", *metrics, ""] if metrics else []),
        "```bash",
        "pip install 'scd_robot[hub]'",
        f"scd hub download {repo_id} --out policy",
        "scd info policy",
        "```",
        "",
        "Metrics are those of the training run, not of an evaluation. The files are safetensors and JSON; "
        "`manifest.json` holds their SHA-256.",
        "",
        "Made with " + ", ".join(f"{name} {version}" for name, version in versions.items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def _check_repository(repo_id: str) -> None:
    if not _REPOSITORY.fullmatch(repo_id):
        raise ConfigError(
            f"a repository on the Hugging Face Hub is named OWNER/NAME, such as someone/push, in letters, digits, '-', "
            f"'_' and '.', got {repo_id!r}"
        )


def _check_names(repo_id: str, names: list[str]) -> None:
    """Raises CheckpointError where a repository holds what is never part of a published checkpoint."""
    foreign = [name for name in names if PurePosixPath(name).suffix.lower() not in _HARMLESS and name not in _GIT_FILES]
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise CheckpointError(
            f"{repo_id} holds {', '.join(sorted(foreign)[:5])}{more}: a checkpoint on the Hub is safetensors, JSON and "
            "Markdown only; take another repository, or remove them there"
        )


def _api() -> Any:
    try:
        import huggingface_hub
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "the Hub needs the package 'huggingface_hub', which is not installed; run pip install 'scd_robot[hub]'"
        ) from error
    return huggingface_hub.HfApi(library_name="scd_robot")


@contextmanager
def _reaching(repo_id: str, revision: str | None = None) -> Iterator[None]:
    """Turns the errors of the Hub's client, and of what it reaches the network with, into one of ours."""
    try:
        yield
    except Exception as error:
        if not any(kind.__module__.startswith(_CLIENTS) for kind in type(error).__mro__):
            raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        what = repo_id if revision is None else f"{repo_id} at {revision!r}"
        raise CheckpointError(
            f"cannot reach {what} on the Hugging Face Hub: {told}; check the name, the "
            "network, and that you are logged in where it is private or to be written (hf auth login)"
        ) from error
