"""The verbs `scd hub upload` and `scd hub download`."""

from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["download", "upload"]


def upload(
    checkpoint: Annotated[Path, tyro.conf.Positional],
    repo: Annotated[str, tyro.conf.Positional],
    /,
    *,
    private: bool = False,
    message: str = "",
) -> None:
    """Uploads a checkpoint to the Hugging Face Hub, with a model card, and without its training state.

    Only safetensors, JSON and Markdown go there. Log in first: 'hf auth login', or the variable HF_TOKEN.

    Args:
        checkpoint: a checkpoint's folder, or a training run's (its newest checkpoint).
        repo: OWNER/NAME; made if it is not there.
        private: a new repository is private.
        message: of the commit.
    """
    from scd_robot.hub import upload as upload_checkpoint

    done = upload_checkpoint(checkpoint, repo, private=private, message=message)
    print(f"uploaded as commit {done.commit}; others have exactly this by")
    print(f"scd hub download {done.repo_id} --revision {done.commit} --out policy")


def download(repo: Annotated[str, tyro.conf.Positional], /, *, out: Path, revision: str | None = None) -> None:
    """Downloads a checkpoint from the Hugging Face Hub; 'scd eval', 'serve' and 'info' take its folder.

    Repositories that hold anything but safetensors, JSON and Markdown are refused, and the checkpoint is checked.

    Args:
        repo: OWNER/NAME.
        out: new folder.
        revision: commit, tag or branch; None = the newest commit. A commit is the only one of these that cannot change.
    """
    from scd_robot.hub import download as download_checkpoint

    done = download_checkpoint(repo, out, revision=revision)
    print(f"{out}: {done.repo_id} at commit {done.commit}")
