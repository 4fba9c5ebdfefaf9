"""The ``clfed`` command: help at once, everything else through Hydra, one exit code an error."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from importlib import import_module
from typing import TYPE_CHECKING, NoReturn

from clfed import __version__
from clfed.config import choices, config_dir, one_sentence, settle
from clfed.errors import ClfedError, ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

GROUPS = {
    "job": "the question to answer",
    "experiment": "whole published set-ups, one file each",
    "data": "what images exist",
    "scenario": "who sees which classes when",
    "backbone": "image to embedding",
    "learner": "how the embedding is trained",
    "unlearner": "how a trained learner forgets",
    "forget": "what is to be forgotten",
    "trainer": "how training runs on this machine",
    "strategy": "how the server merges what nodes send",
    "curriculum": "in which order nodes train on their images, and which nodes train",
    "privacy": "what a message reveals",
    "engine": "who carries the messages",
    "logger": "where metrics go beside metrics.csv",
}

COMMANDS = ("create", "invite", "serve", "join", "forget", "status", "predict")

USAGE = """\
usage: clfed [GROUP=CHOICE ...] [KEY=VALUE ...] [-m]
       clfed COMMAND ...

  clfed                                        the main job on embedded data, no network needed
  clfed experiment=omniglot600 data.root=DIR   a published set-up
  clfed -m learner=protonet,cross_entropy seed=0,1,2    a sweep over all combinations
  clfed --cfg job                              the configuration, not run
  clfed --config-dir DIR experiment=mine       your own configuration files beside ours

Frequent keys: seed=0 run_dir=DIR cache_dir=DIR smoke=true merge=legacy_double_shrink logger=none
"""


def main() -> None:
    """Run the command line and exit with 0, an error's own code, or 130 after an interrupt."""
    arguments = sys.argv[1:]
    if arguments and arguments[0] in COMMANDS:
        command(arguments[0], arguments[1:])
        return
    if {"-h", "--help"} & set(arguments):
        sys.stdout.write(help_text())
        return
    if "--version" in arguments:
        sys.stdout.write(f"clfed {__version__}\n")
        return
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    be_considerate()
    # Hydra would print its own shortened traceback and exit with 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    failures: list[ClfedError] = []
    composed = False

    def task(cfg: DictConfig) -> None:
        nonlocal composed
        composed = True
        try:
            run(cfg)
        except ClfedError as error:
            failures.append(error)

    try:
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")(task)()
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        # Hydra raises ValueError for group choices that are no names, such as logger=null.
        if composed and not isinstance(error, HydraException | OmegaConfBaseException):
            raise
        fail([ConfigError(one_sentence(error))])
    except KeyboardInterrupt:
        sys.stderr.write("clfed: interrupted\n")
        sys.exit(130)
    if failures:
        fail(failures)


def command(name: str, arguments: list[str]) -> None:
    """Run one of the commands for real nodes, and exit as :func:`main` does."""
    module = import_module(f"clfed.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"clfed {name}", description=module.__doc__)
    module.add_arguments(parser)
    parsed = parser.parse_intermixed_args(arguments)
    be_considerate()
    # So that an end asked for by the system cleans up as one from the keyboard does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        module.run(parsed)
    except ClfedError as error:
        fail([error])
    except KeyboardInterrupt:
        sys.stderr.write("clfed: interrupted\n")
        sys.exit(130)


def be_considerate() -> None:
    """Choose threads that sleep: spinning ones make a shared machine several times slower.

    This counts only before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def run(cfg: DictConfig) -> None:
    """Run the job of one composed configuration, as one run or as one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from hydra.utils import get_method

    cfg = settle(cfg)
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN and cfg.run_dir is not None:
        cfg.run_dir = os.path.join(cfg.run_dir, str(hydra_cfg.job.num))  # noqa: PTH118
    target = cfg.job["_target_"]
    try:
        job = get_method(target)
    except (ImportError, ValueError) as error:
        raise ConfigError(
            f"job._target_ {target!r} cannot be used: {one_sentence(error)}"
        ) from error
    job(cfg)


def fail(errors: list[ClfedError]) -> NoReturn:
    """Print each error with its remedy and exit with the first one's code."""
    for error in errors:
        sys.stderr.write(f"clfed: {error}\n  {error.remedy}\n")
    sys.exit(errors[0].code)


def help_text() -> str:
    """Return usage and every group's choices with a sentence each."""
    rows = [f"  {name:<22}{_sentence(name)}" for name in COMMANDS]
    told = "COMMAND: real nodes on separate machines; clfed COMMAND --help says more\n"
    parts = [USAGE, told + "\n".join(rows) + "\n"]
    for group, meaning in GROUPS.items():
        rows = [f"  {name:<22}{sentence}".rstrip() for name, sentence in choices(group)]
        parts.append(f"{group}: {meaning}\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def _sentence(name: str) -> str:
    return str(import_module(f"clfed.commands.{name}").SENTENCE)
