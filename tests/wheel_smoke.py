"""Checks an installed scd_robot, from any folder: python tests/wheel_smoke.py [--all].

Every module is imported and every name in every `__all__` looked up; `scd` answers; `datasets` is not ours. A module
that needs a package of an extra may refuse where that package is absent; with --all nothing may refuse.

A plain script without pytest, so that it runs in an environment that holds nothing but the wheel.
"""

import importlib
import pkgutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import scd_robot

# Packages of the extras: absent from a bare installation.
OPTIONAL = {
    "fsspec",
    "gym_pusht",
    "gymnasium",
    "matplotlib",
    "metaworld",
    "msgpack",
    "pyarrow",
    "pymunk",
    "robomimic",
    "websockets",
}


def import_everything(allow_refusals: bool) -> list[str]:
    """Imports all modules and returns what is wrong with them, one line each."""
    problems = []
    names = list(module_names(scd_robot.__path__, "scd_robot."))
    for name in ["scd_robot", *names]:
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            if not (allow_refusals and needs_an_extra(error)):
                problems.append(f"{name} cannot be imported: {error}")
            continue
        exported = getattr(module, "__all__", [])
        problems += [f"{name}.__all__ names {n!r}, which is not there" for n in exported if not hasattr(module, n)]
    for part in ("cli.main", "datasets", "policies", "sim_eval", "model", "training"):
        if f"scd_robot.{part}" not in names:
            problems.append(f"scd_robot.{part} is not installed")
    print(f"{len(names) + 1} modules of scd_robot {scd_robot.__version__} from {Path(scd_robot.__file__).parent}")
    return problems


def module_names(path: Iterable[str], prefix: str) -> Iterator[str]:
    """The full names of all modules below the folders of `path`, importing none."""
    for module in pkgutil.iter_modules(path, prefix):
        if module.name == "scd_robot.scd_robot":  # in a checkout, whose root is on the path as well
            continue
        yield module.name
        if module.ispkg:
            below = [Path(folder, module.name.rpartition(".")[2]) for folder in path]
            yield from module_names([str(folder) for folder in below], f"{module.name}.")


def needs_an_extra(error: ImportError) -> bool:
    """Whether an optional package is at the bottom of this error."""
    chain: BaseException | None = error
    while chain is not None:
        if isinstance(chain, ModuleNotFoundError) and (chain.name or "").split(".")[0] in OPTIONAL:
            return True
        chain = chain.__cause__
    return False


def call_the_program() -> list[str]:
    """Runs `scd` in processes of its own and returns what is wrong, one line each."""
    scd = Path(sys.executable).with_name("scd")
    problems = []
    for arguments, code, word in [
        (["--help"], 0, "verbs:"),
        (["--version"], 0, scd_robot.__version__),
        (["train", "--help"], 0, "--dataset"),
        (["trian"], 2, "did you mean 'train'"),
    ]:
        done = subprocess.run([scd, *arguments], capture_output=True, text=True, check=False)
        if done.returncode != code or word not in done.stdout + done.stderr:
            said = (done.stdout + done.stderr)[-2000:]
            problems.append(f"scd {' '.join(arguments)}: exit code {done.returncode} without {word!r}:\n{said}")
    return problems


def datasets_is_not_ours() -> list[str]:
    """Checks that the bare name is left to Hugging Face's package."""
    try:
        module = importlib.import_module("datasets")
    except ModuleNotFoundError:
        return []
    return ["'import datasets' gives scd_robot's folder"] if "scd_robot" in (module.__doc__ or "") else []


def main() -> int:
    """Prints all problems; the exit code is 1 where there are any."""
    problems = import_everything(allow_refusals="--all" not in sys.argv) + call_the_program() + datasets_is_not_ours()
    print("\n".join(problems) if problems else "all there")
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
