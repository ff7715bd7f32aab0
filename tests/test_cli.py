"""The program `scd`: verbs, help, and one clear sentence with exit code 2 for what the user can mend."""

import errno
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import tyro

from scd_robot.cli.main import VERBS, Verb, main
from scd_robot.errors import DatasetError, UnknownNameError

InstallVerb = Callable[[Callable[..., None]], None]


@pytest.fixture
def install_verb(monkeypatch: pytest.MonkeyPatch) -> InstallVerb:
    """Puts a function in the place of the verb `train`."""

    def install(function: Callable[..., None]) -> None:
        module = ModuleType("stand_in_verb")
        module.function = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "stand_in_verb", module)
        monkeypatch.setitem(VERBS, "train", Verb("stand_in_verb", "function", "a stand-in"))

    return install


def install_failing_verb(install_verb: InstallVerb, error: BaseException) -> None:
    """A verb that raises `error`."""

    def fail() -> None:
        """Fails."""
        raise error

    install_verb(fail)


def test_help_lists_every_verb_and_its_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert name in shown
        assert verb.summary in shown


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_verb_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    assert f"scd {name}" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(VERBS))
def test_help_names_what_is_to_be_given_and_wraps_at_the_width_of_the_terminal(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main([*name.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    function = getattr(importlib.import_module(VERBS[name].module), VERBS[name].function)
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.POSITIONAL_ONLY:
            assert f" {parameter.name.upper().removesuffix('S').removesuffix('IE')}" in shown.splitlines()[0]
    assert "{None}" not in shown
    assert "--no-overwrite" not in shown
    docstring = inspect.getdoc(function) or ""
    for text in re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", docstring.partition("Args:")[2], flags=re.MULTILINE):
        words = " ".join(text[1].split())
        group = text[0] in ("read", "imagining")  # of options
        assert group or words[:90] in shown, f"{text[0]} is cut"


def test_options_are_passed_on_as_they_are(install_verb: InstallVerb) -> None:
    called = []

    def verb(
        source: Annotated[Path, tyro.conf.Positional],
        /,
        *,
        count: int | None = None,
        on: bool = False,
        many: tuple[int, ...] = (),
    ) -> int:
        """Does.

        Args:
            source: what.
            count: how many.
            on: whether.
            many: which.
        """
        called.append((source, count, on, many))
        return 3

    install_verb(verb)
    assert main(["train", "a/b", "--count", "4", "--on"]) == 3
    assert main(["train", "c"]) == 3
    assert called == [(Path("a/b"), 4, True, ()), (Path("c"), None, False, ())]


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_nothing_to_do_shows_the_verbs_and_is_bad_usage(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "data record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["trian"], "'train'"),
        (["data", "recrod"], "'data record'"),
        (["record"], "'data record'"),
        (["--versoin"], "'--version'"),
    ],
)
def test_unknown_verb_suggests_the_nearest(
    arguments: list[str], nearest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("scd: error: unknown ")
    assert nearest in shown.err


def test_options_reach_the_verb(install_verb: InstallVerb) -> None:
    seen = {}

    def record(dataset: Path, max_steps: int = 1) -> None:
        """Remembers its options."""
        seen.update(dataset=dataset, max_steps=max_steps)

    install_verb(record)
    assert main(["train", "--dataset", "some/where", "--max-steps", "7"]) == 0
    assert seen == {"dataset": Path("some/where"), "max_steps": 7}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataste", "x"], "--dataset"),
        ([], "--dataset"),
        (["--dataset", "x", "--max-steps", "many"], "many"),
    ],
)
def test_bad_options_exit_2_and_do_not_run_the_verb(
    arguments: list[str], told: str, install_verb: InstallVerb, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(dataset: Path, max_steps: int = 1) -> None:
        """Must not run."""
        raise AssertionError((dataset, max_steps))

    install_verb(record)
    assert main(["train", *arguments]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            DatasetError("the store 'x' is empty;\n  record some episodes"),
            "the store 'x' is empty; record some episodes",
        ),
        (UnknownNameError("task", "push", ["push-v3"]), "unknown task 'push'; did you mean 'push-v3'?"),
        (OSError(errno.ENOSPC, "full", "/x/y"), "'/x/y': no space left on device; free some space"),
        (OSError(errno.ENOSPC, "full"), "no space left on device; free some space"),
        (PermissionError(errno.EACCES, "no", "/x/y"), "'/x/y': permission denied; check its permissions"),
        (FileNotFoundError(errno.ENOENT, "no", "/x/y"), "'/x/y': no such file or directory; check the path"),
    ],
)
def test_what_the_user_can_mend_is_one_sentence(
    error: Exception, sentence: str, install_verb: InstallVerb, capsys: pytest.CaptureFixture[str]
) -> None:
    install_failing_verb(install_verb, error)
    assert main(["train"]) == 2
    shown = capsys.readouterr().err
    assert shown.startswith(f"scd: error: {sentence}")
    assert shown.count("\n") == 1


def test_verbose_adds_the_traceback(
    install_verb: InstallVerb, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    install_failing_verb(install_verb, DatasetError("empty"))
    assert main(["train"]) == 2
    assert "Traceback" not in caplog.text
    assert main(["-v", "train"]) == 2
    assert "Traceback" in caplog.text
    assert capsys.readouterr().err == "scd: error: empty\n" * 2


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError(errno.EIO, "a broken disk"), ValueError("a bug")])
def test_bugs_are_not_hidden(error: Exception, install_verb: InstallVerb) -> None:
    install_failing_verb(install_verb, error)
    with pytest.raises(type(error)):
        main(["train"])


def test_interruption_exits_130(install_verb: InstallVerb) -> None:
    install_failing_verb(install_verb, KeyboardInterrupt())
    assert main(["train"]) == 130


def test_progress_in_a_file_is_a_few_plain_lines() -> None:
    program = (
        "import sys, types; from scd_robot.cli.main import VERBS, Verb, main\n"
        "def count(): from tqdm import tqdm; list(tqdm(range(1000), 'counting')); tqdm(desc='endless').close()\n"
        "sys.modules['verb'] = types.SimpleNamespace(function=count); VERBS['train'] = Verb('verb', 'function', '')\n"
        "main(['train'])"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stderr.decode()
    assert "\u2588" not in told
    first, last = (line for line in told.split("\n") if "counting" in line)
    assert (first.count("/1000"), last.count("1000/1000")) == (1, 1)
    assert "\r" not in first.strip() + last.strip()


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = subprocess.Popen(
        [sys.executable, "-c", "from scd_robot.cli.main import main; raise SystemExit(main(['--help']))"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    assert program.wait(timeout=60) == 0
