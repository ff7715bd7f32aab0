"""Every command and file that README.md names exists, and every command that the pages of docs/ print."""

import functools
import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from scd_robot.cli.main import VERBS, main

CHECKOUT = Path(__file__).parent.parent
README = (CHECKOUT / "README.md").read_text()
DOCS = "\n".join(path.read_text() for path in sorted(CHECKOUT.glob("docs/*.md")))


def commands(text: str = README) -> list[list[str]]:
    """The commands in code fences marked `bash`, split into words; a backslash joins lines."""
    found = []
    for fence in re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        for line in fence.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # variables set for one command
                words.pop(0)
            if words:
                found.append(words)
    return found


def calls_of(program: str, text: str = README) -> list[list[str]]:
    """The arguments of every call of a program, wherever its file lies."""
    return [words[1:] for words in commands(text) if Path(words[0]).name == program]


def test_readme_shows_how_to_start() -> None:
    assert calls_of("scd")
    assert ["demo"] in calls_of("make")


@pytest.mark.parametrize("arguments", calls_of("scd", README + DOCS), ids=" ".join)
def test_scd_commands_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for verb in VERBS.values():
        module = importlib.import_module(verb.module)

        @functools.wraps(getattr(module, verb.function))
        def remember(*values: Any, **options: Any) -> None:
            called.append((values, options))

        monkeypatch.setattr(module, verb.function, remember)
    assert main(arguments) == 0
    assert called or {"--help", "-h", "--version"} & set(arguments)


@pytest.mark.parametrize("arguments", calls_of("make", README + DOCS), ids=" ".join)
def test_make_targets_exist(arguments: list[str]) -> None:
    makefile = (CHECKOUT / "Makefile").read_text()
    for target in (word for word in arguments if "=" not in word and not word.startswith("-")):
        assert re.search(rf"^{re.escape(target)}:", makefile, flags=re.MULTILINE), f"no make target {target!r}"


def test_scripts_of_the_readme_exist() -> None:
    scripts = [word for words in calls_of("python") + calls_of("python3") for word in words if word.endswith(".py")]
    assert [script for script in scripts if not (CHECKOUT / script).is_file()] == []


def test_links_of_the_readme_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#\s]+)", README)
    local = [link for link in links if not link.startswith(("http://", "https://"))]
    assert [link for link in local if not (CHECKOUT / link).exists()] == []


def test_files_of_the_readme_exist() -> None:
    folders = "scd_robot|datasets|policies|sim_eval|tests|benchmarks|examples|docs|constraints"
    named = re.findall(rf"`((?:{folders})/[\w./-]*|[\w.-]+\.(?:md|txt|toml))`", README)
    assert [name for name in named if not (CHECKOUT / name).exists()] == []
