"""The program `scd`: finds the verb, lets tyro parse its options, and turns errors into exit codes.

Each verb is one typed function in a module of its own: its signature and docstring become the options and their help,
it returns nothing (or an exit code), and it raises an `ScdRobotError` for what the user can mend. Only the called
verb's module is imported, so that `scd --help` answers at once.
"""

import errno
import importlib
import inspect
import logging
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import scd_robot
from scd_robot.errors import ConfigError, ScdRobotError, UnknownNameError

__all__ = ["VERBS", "Verb", "main"]

logger = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

INTRODUCTION = "Robot trajectory generation with Separable Causal Diffusion."
DETAILS = """\
options before the verb:
  -h, --help     this text; 'scd VERB --help' shows the options of a verb
  --version      the installed version
  -v, --verbose  log details, and show the traceback of errors in the input as well

a first run, about as 'scd demo' does it:
  scd data record metaworld/push-v3 --episodes 100 --action-noise 0.1 --out data/push.zarr
  scd train metaworld_state --dataset data/push.zarr --out runs/push
  scd eval runs/push --env metaworld/push-v3 --episodes 50 --out runs/push-eval

exit codes:
  0    done
  1    from 'scd data validate': something would spoil training; from 'scd data replay': the recording is not
       reproduced; from 'scd doctor': something does not work; otherwise a bug of ours, with its traceback
  2    bad usage or input (one sentence says what); from 'scd eval' and 'scd sweep': an evaluation failed, or had
       no valid episode
  130  interrupted (143: terminated)"""

# Bars into a file or a pipe (tqdm reads these where it is imported): plain lines, and few of them.
PROGRESS_IN_FILES = {
    "TQDM_BAR_FORMAT": "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]\n",
    "TQDM_MININTERVAL": "30",
    "TQDM_MAXINTERVAL": "30",
}

# What to do about the operating system's refusals; any other OSError is taken for a bug.
FILE_HINTS = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "name a file instead",
    errno.EACCES: "check its permissions or choose another path",
    errno.EPERM: "check its permissions or choose another path",
    errno.EROFS: "choose a path on a writable file system",
    errno.ENOSPC: "free some space or choose a path on another disk",
    errno.EDQUOT: "free some space or choose a path on another disk",
}


@dataclass(frozen=True)
class Verb:
    """Where the function of one verb is found.

    Attributes:
        module: imported only when the verb is called.
        function: its name in the module.
        summary: one line for `scd --help`.
    """

    module: str
    function: str
    summary: str


VERBS = {
    "demo": Verb("scd_robot.cli.demo", "demo", "record, train and evaluate one task, then show the report"),
    "data record": Verb("scd_robot.cli.data", "record", "record demonstrations of a simulator's scripted expert"),
    "data info": Verb("scd_robot.cli.data", "info", "what a dataset holds: episodes, keys, shapes, ranges, pictures"),
    "data validate": Verb("scd_robot.cli.data_check", "validate", "look for what would spoil training"),
    "data replay": Verb("scd_robot.cli.data_check", "replay", "replay a dataset's actions in the simulator"),
    "data convert": Verb("scd_robot.cli.data_edit", "convert", "copy a dataset into another format"),
    "data merge": Verb("scd_robot.cli.data_edit", "merge", "several datasets into one"),
    "data split": Verb("scd_robot.cli.data_edit", "split", "deal episodes out to several datasets"),
    "data filter": Verb("scd_robot.cli.data_edit", "filter_episodes", "copy episodes that meet conditions"),
    "train": Verb("scd_robot.cli.train", "train", "train a policy on a dataset, or continue an interrupted run"),
    "train-autoencoder": Verb(
        "scd_robot.cli.train_autoencoder", "train_autoencoder", "make few numbers of large pictures, to imagine them by"
    ),
    "distill": Verb("scd_robot.cli.distill", "distill", "teach a trained policy to plan in one or two denoising steps"),
    "eval": Verb("scd_robot.cli.evaluate", "evaluate", "run a checkpoint in closed loop: success rate, times, report"),
    "sweep": Verb("scd_robot.cli.sweep", "sweep", "evaluate checkpoints in environments, here or on a cluster"),
    "compare": Verb("scd_robot.cli.compare", "compare", "tell which of two policies is better"),
    "imagine": Verb("scd_robot.cli.imagine", "imagine", "frames that a model imagines, beside recorded ones"),
    "surprise": Verb("scd_robot.cli.surprise", "surprise", "when a robot saw what a model of frames did not expect"),
    "probe": Verb("scd_robot.cli.probe", "probe", "what an entangled model repeats while it denoises, layer by layer"),
    "convert-policy": Verb(
        "scd_robot.cli.convert", "convert_policy", "make an entangled policy separable, with brief fine-tuning"
    ),
    "export": Verb(
        "scd_robot.cli.export", "export", "write a policy as ONNX (or torch) graphs, and compare them with it"
    ),
    "replay-log": Verb("scd_robot.cli.replay_log", "replay_log", "show what a control loop's flight recorder kept"),
    "serve": Verb("scd_robot.cli.serve", "serve", "answer robots over the network: openpi's protocol, with history"),
    "hub upload": Verb("scd_robot.cli.hub", "upload", "publish a checkpoint on the Hugging Face Hub, with a card"),
    "hub download": Verb("scd_robot.cli.hub", "download", "fetch a checkpoint from the Hugging Face Hub"),
    "doctor": Verb("scd_robot.cli.doctor", "doctor", "what works here, which versions clash, what to install"),
    "info": Verb("scd_robot.cli.checkpoint_info", "info", "what a checkpoint holds: sizes, dataset, metrics, versions"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
        argv: the arguments without the program's name; None = those of this process.

    Returns:
        The exit code. Exceptions that are bugs of ours pass through: Python prints them and exits with 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verbose = bool(arguments) and arguments[0] in ("-v", "--verbose")
    if verbose:
        arguments.pop(0)
    set_up_logging(verbose)
    if not sys.stderr.isatty():
        for name, value in PROGRESS_IN_FILES.items():
            os.environ.setdefault(name, value)
    try:
        code = dispatch(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print("scd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nor may Python's flush at exit complain
        return EXIT_DONE
    except ScdRobotError as error:
        message = str(error)
        logger.debug("the error in full:", exc_info=error)
    except OSError as error:
        if error.errno not in FILE_HINTS:
            raise
        message = describe_os_error(error)
        logger.debug("the error in full:", exc_info=error)
    print(f"scd: error: {' '.join(message.split())}", file=sys.stderr)
    return EXIT_BAD_INPUT


def dispatch(arguments: Sequence[str]) -> int:
    """Answers `--help` and `--version`, or finds the verb and runs it.

    Raises:
        UnknownNameError: for a verb or a leading option that does not exist.
    """
    groups = {name.split()[0] for name in VERBS if " " in name}
    first = arguments[0] if arguments else ""
    if first in ("", "-h", "--help"):
        print(help_text())
        return EXIT_DONE if first else EXIT_BAD_INPUT
    if first == "--version":
        print(f"scd {scd_robot.__version__}")
        return EXIT_DONE
    if first.startswith("-"):
        raise UnknownNameError("option before the verb", first, ["--help", "--version", "--verbose"])
    if first not in groups:
        return run_verb(first, arguments[1:])
    second = arguments[1] if len(arguments) > 1 else ""
    if second in ("", "-h", "--help"):
        print(help_text(first))
        return EXIT_DONE if second else EXIT_BAD_INPUT
    return run_verb(f"{first} {second}", arguments[2:])


def run_verb(name: str, arguments: Sequence[str]) -> int:
    """Parses the verb's options and calls its function.

    Raises:
        UnknownNameError: there is no such verb.
        ConfigError: settings stand outside of --set.
    """
    if name not in VERBS:
        raise UnknownNameError("verb", name, VERBS)
    import tyro

    from scd_robot.cli.options import CONFIG, readable

    function = getattr(importlib.import_module(VERBS[name].module), VERBS[name].function)
    loose = [argument for argument in arguments if re.match(r"(model|policy|training|transforms)\.[\w.]+=", argument)]
    if loose and "settings" in inspect.signature(function).parameters and "--set" not in arguments:
        raise ConfigError(f"settings stand after --set; write: --set {' '.join(loose)}")
    try:
        code = tyro.cli(readable(function), prog=f"scd {name}", args=list(arguments), config=CONFIG)
    except SystemExit as stop:  # tyro has shown the help (0) or what is wrong with the options (2)
        return stop.code if isinstance(stop.code, int) else EXIT_BAD_INPUT
    return EXIT_DONE if code is None else int(code)


def help_text(group: str = "") -> str:
    """The help of the program, or of the verbs that begin with `group`."""
    names = [name for name in VERBS if name.startswith(f"{group} " if group else "")]
    width = max(len(name) for name in names)
    listing = "\n".join(f"  {name:{width}}  {VERBS[name].summary}" for name in names)
    if group:
        return f"usage: scd {group} VERB ...\n\nverbs:\n{listing}\n\n'scd {group} VERB --help' shows the options of one"
    return f"usage: scd [-v] VERB ...\n\n{INTRODUCTION}\n\nverbs:\n{listing}\n\n{DETAILS}"


def describe_os_error(error: OSError) -> str:
    """One sentence: which path, what the system said, what to do."""
    path = f"{os.fspath(error.filename)!r}: " if error.filename else ""
    reason = os.strerror(error.errno).lower() if error.errno else str(error)
    return f"{path}{reason}; {FILE_HINTS.get(error.errno or 0, 'check the path')}"


def set_up_logging(verbose: bool) -> None:
    """Sends log messages to standard error: our own from INFO on, those of other packages from WARNING on."""
    detailed = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(format=detailed if verbose else "%(message)s", level=logging.WARNING)
    logging.getLogger("scd_robot").setLevel(logging.DEBUG if verbose else logging.INFO)


if __name__ == "__main__":
    sys.exit(main())
