"""Checkpoints on the Hugging Face Hub: what goes there, what is let in, and that a commit is a commit."""

import hashlib
import inspect
import json
import shutil
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from scd_robot.checkpoint import find_checkpoint, list_checkpoints, read_checkpoint
from scd_robot.cli.main import main
from scd_robot.errors import CheckpointError
from scd_robot.hub import download, upload
from scd_robot.policies import load_policy

REPO = "someone/policy"


class FakeApi:
    """What we use of `huggingface_hub.HfApi`, with a folder for each commit."""

    root: Path

    def __init__(self, library_name=None):
        assert library_name == "scd_robot"

    def create_repo(self, repo_id, *, repo_type=None, private=None, exist_ok=False):
        assert exist_ok
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def list_repo_files(self, repo_id, *, revision=None, repo_type=None):
        if not self._commits(repo_id):
            return [".gitattributes"]
        folder = self._folder(repo_id, revision)
        return [".gitattributes", *(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())]

    def upload_folder(self, *, repo_id, folder_path, repo_type=None, commit_message=None):
        commits = self._commits(repo_id)
        oid = hashlib.sha1(f"{len(commits)}".encode()).hexdigest()
        folder = self.root / repo_id / f"{len(commits):03d}-{oid}"
        if commits:
            shutil.copytree(commits[-1], folder)
        shutil.copytree(folder_path, folder, dirs_exist_ok=True)
        return SimpleNamespace(oid=oid, message=commit_message)

    def repo_info(self, repo_id, *, revision=None, repo_type=None):
        return SimpleNamespace(sha=self._folder(repo_id, revision).name.partition("-")[2])

    def hf_hub_download(self, repo_id, filename, *, revision=None, repo_type=None, local_dir=None):
        source = self._folder(repo_id, revision) / filename
        self.downloads.append(filename)
        return shutil.copyfile(source, Path(local_dir) / filename)

    def _commits(self, repo_id):
        return sorted((self.root / repo_id).glob("*-*"))

    def _folder(self, repo_id, revision):
        found = [folder for folder in self._commits(repo_id) if revision in (None, folder.name.partition("-")[2])]
        if not found:
            raise hub_error("404 Client Error. Repository or revision not found.\nmore lines")
        return found[-1]


def hub_error(text):
    kind = type("HfHubHTTPError", (OSError,), {"__module__": "huggingface_hub.errors"})
    return kind(text)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> type[FakeApi]:
    """A Hub in a folder, in the place of the package."""
    api = type("Api", (FakeApi,), {"root": tmp_path / "hub", "downloads": []})
    module = types.ModuleType("huggingface_hub")
    module.HfApi = api
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return api


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in Path(folder).rglob("*"))


def action(folder):
    policy = load_policy(folder)
    policy.reset(episodes=[0])
    return policy.act({key: np.ones((1, *spec.shape), np.float32) for key, spec in policy.spec.observation.items()})


def repository(hub):
    return sorted((hub.root / REPO).glob("*-*"))[-1]


def test_a_checkpoint_comes_back_without_its_training_state_and_acts_alike(tiny_run, hub, tmp_path, capsys):
    assert main(["hub", "upload", str(tiny_run), REPO, "--private"]) == 0
    told = capsys.readouterr().out
    assert main(["hub", "download", REPO, "--out", str(tmp_path / "a" / "policy")]) == 0
    names = ["README.md", "config.json", "dataset.json", "manifest.json", "metrics.json", "model.safetensors"]
    assert files(tmp_path / "a") == ["policy", *(f"policy/{n}" for n in [*names, "normalization.json", "origin.json"])]
    assert (find_checkpoint(tiny_run) / "resume").is_dir()
    np.testing.assert_array_equal(action(tmp_path / "a" / "policy"), action(tiny_run))
    commit = told.split("--revision ")[1].split()[0]
    assert commit in capsys.readouterr().out


def test_the_model_card_says_what_the_checkpoint_is(tiny_run, hub):
    upload(tiny_run, REPO)
    card, checkpoint = (repository(hub) / "README.md").read_text(), read_checkpoint(tiny_run)
    assert card.startswith("---\nlibrary_name: scd_robot\n")
    for told in ("# policy", "step 4", "`position` | (2,) float32", "scd hub download someone/policy", "0.05 s"):
        assert told in card
    assert checkpoint.metrics
    for name, value in checkpoint.metrics.items():
        assert f"| {name} | {value:.5g} |" in card


def test_a_revision_is_had_again_after_others(tiny_run, hub, tmp_path):
    older, newer = list_checkpoints(tiny_run)
    first, second = upload(older, REPO), upload(newer, REPO)
    assert download(REPO, tmp_path / "newest") == second != first
    assert download(REPO, tmp_path / "pinned", revision=first.commit) == first
    steps = [read_checkpoint(tmp_path / name).step for name in ("newest", "pinned")]
    assert steps == [read_checkpoint(path).step for path in (newer, older)]


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "resume/training_state.ckpt", "run.py", "policy.json.pkl", "Makefile", "a.PT"]
)
def test_repositories_with_other_files_are_refused_before_anything_is_fetched(name, tiny_run, hub, tmp_path, refused):
    upload(tiny_run, REPO)
    file = repository(hub) / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"x")
    refused(["hub", "download", REPO, "--out", tmp_path / "policy"], name, "safetensors, JSON and Markdown only")
    assert hub.downloads == []
    refused(["hub", "upload", tiny_run, REPO], name)
    assert len(list((hub.root / REPO).glob("*-*"))) == 1


def test_harmless_files_beside_it_are_left_there(tiny_run, hub, tmp_path):
    upload(tiny_run, REPO)
    (repository(hub) / "evaluation").mkdir()
    (repository(hub) / "evaluation" / "result.json").write_text("{}")
    download(REPO, tmp_path / "policy")
    assert not (tmp_path / "policy" / "evaluation").exists()


def test_changed_and_missing_files_leave_nothing_behind(tiny_run, hub, tmp_path, refused):
    upload(tiny_run, REPO)
    config = repository(hub) / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"preset": "another"}))
    out = ["--out", tmp_path / "new" / "policy"]
    refused(["hub", "download", REPO, *out], "config.json was truncated or changed")
    config.unlink()
    refused(["hub", "download", REPO, *out], "it lacks config.json")
    assert files(tmp_path / "new") == []


def test_what_is_there_is_not_replaced(tiny_run, hub, tmp_path, refused):
    upload(tiny_run, REPO)
    (tmp_path / "policy").mkdir()
    refused(["hub", "download", REPO, "--out", tmp_path / "policy"], "exists already")
    assert hub.downloads == []


@pytest.mark.parametrize("name", ["push", "a/b/c", "a/ b", "a/-b", "/b", "a/.", "ä/b"])
def test_a_name_that_is_none_is_told_before_anything_is_read_or_reached(name, hub, tmp_path, refused):
    refused(["hub", "upload", tmp_path / "no run", name], "is named OWNER/NAME", f"got {name!r}")
    refused(["hub", "download", name, "--out", tmp_path / "policy"], "is named OWNER/NAME", unchanged=[tmp_path])


@pytest.mark.parametrize("name", ["a/b", "Some-one_1/push.v2"])
def test_names_are_taken(name, tiny_run, hub):
    assert upload(tiny_run, name).repo_id == name


def test_damaged_checkpoints_are_not_uploaded(tiny_run, hub, tmp_path, refused):
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (find_checkpoint(run) / "metrics.json").write_text("{}")
    refused(["hub", "upload", run, REPO], "metrics.json was truncated or changed")
    assert not hub.root.exists()


def test_errors_of_the_hub_are_one_sentence_and_bugs_are_not_hidden(hub, tmp_path, refused, monkeypatch):
    refused(
        ["hub", "download", REPO, "--out", tmp_path / "p", "--revision", "v9"], "'v9'", "404 Client", "hf auth login"
    )
    monkeypatch.setattr(hub, "repo_info", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        download(REPO, tmp_path / "p")


def test_without_the_package_the_command_is_told(tiny_run, tmp_path, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused(["hub", "download", REPO, "--out", tmp_path / "p"], "pip install 'scd_robot[hub]'")
    refused(["hub", "upload", tiny_run, REPO], "pip install 'scd_robot[hub]'")


@pytest.mark.parametrize("name", [name for name in vars(FakeApi) if not name.startswith("_") and name != "root"])
def test_the_real_client_takes_what_the_fake_one_takes(name):
    real = pytest.importorskip("huggingface_hub").HfApi
    theirs = inspect.signature(getattr(real, name)).parameters
    assert set(inspect.signature(getattr(FakeApi, name)).parameters) <= set(theirs)


def test_an_error_without_words_is_told_by_its_kind(hub, tmp_path, monkeypatch) -> None:
    def nothing(*arguments: object) -> None:
        raise hub_error("")

    monkeypatch.setattr(hub, "_folder", nothing)
    with pytest.raises(CheckpointError, match="Hub: HfHubHTTPError; check the name"):
        download(REPO, tmp_path / "policy")
