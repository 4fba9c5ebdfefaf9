"""Every configuration file: composes, names what exists, and says what it is for."""

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra.utils import get_object
from omegaconf import OmegaConf

from clfed.cli import GROUPS, USAGE
from clfed.config import build, choices, compose, config_dir
from clfed.errors import ConfigError

FOLDER = config_dir()
FILES = sorted(path.relative_to(FOLDER) for path in FOLDER.rglob("*.yaml"))
IN_GROUPS = [path for path in FILES if len(path.parts) == 2]
EXPERIMENTS = [path.stem for path in IN_GROUPS if path.parts[0] == "experiment"]
# What the program adds to the settings of a group when it builds them.
GIVEN = {
    "scenario": {"benchmark", "seed"},
    "backbone": {"in_channels", "image_size"},
    "learner": {"backbone", "transform", "num_classes", "dim"},
    "unlearner": {"learner", "seed"},
    "forget": {"holdings", "seed", "original"},
    "strategy": {"empty", "merge", "initial", "briefing", "session", "nodes", "encoder", "seed"},
    "engine": {"serve", "nodes"},
    "logger": {"folder", "config"},
}
# A job takes the whole configuration; its keys are its own vocabulary.
TAKES_EVERYTHING = {"job"}


def chosen(path: Path) -> str:
    return f"{path.parts[0]}={path.stem}"


def targets(node: object) -> Iterator[str]:
    """Every ``_target_`` in a configuration, at any depth."""
    for item in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from targets(item)
    if isinstance(node, dict) and node.get("_target_"):
        yield node["_target_"]


def plain(path: Path) -> dict:
    return OmegaConf.to_container(compose([chosen(path)]))


@pytest.mark.parametrize("path", IN_GROUPS, ids=str)
def test_every_choice_composes_and_its_targets_exist(path):
    for target in targets(plain(path)):
        assert callable(get_object(target)), target


@pytest.mark.parametrize(
    "path", [p for p in IN_GROUPS if p.parts[0] in GIVEN | {"data": ()}], ids=str
)
def test_every_setting_is_one_that_its_target_takes(path):
    settings = plain(path)[path.parts[0]]
    target = settings.pop("_target_")
    if target is None:
        return
    given = GIVEN.get(path.parts[0], set())
    signature = inspect.signature(get_object(target))
    assert not set(settings) & given
    signature.bind(**settings, **dict.fromkeys(given & set(signature.parameters)))


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_starts_with_a_sentence(path):
    lines = (FOLDER / path).read_text(encoding="utf-8").splitlines()
    first = next(line for line in lines if "@package" not in line)
    assert re.match(r"# \w.{10,}", first), first


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_command_in_a_comment_composes(path):
    text = (FOLDER / path).read_text(encoding="utf-8")
    own = [chosen(path)] if len(path.parts) == 2 else []
    for line in (line.partition("#")[2] for line in text.splitlines()):
        for found in re.findall(r"clfed((?: [\w.]+=[^\s,]\S*)+)", line):
            compose([*own, *found.split()])


def test_the_commands_of_the_usage_compose():
    found = re.findall(r"clfed((?: [a-z_.]+=\w+)+)", USAGE)
    assert found
    for overrides in found:
        compose(overrides.split())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_is_smaller_with_smoke(name):
    whole, smoke = compose([f"experiment={name}"]), compose([f"experiment={name}", "smoke=true"])
    assert OmegaConf.to_container(whole) != {**OmegaConf.to_container(smoke), "smoke": False}
    for key in whole.when_smoke:
        assert OmegaConf.merge(smoke[key], whole.when_smoke[key]) == smoke[key]


def test_every_group_has_a_line_in_help_and_every_line_a_group():
    groups = {path.parts[0] for path in IN_GROUPS}
    assert groups == set(GROUPS)
    assert all(dict(choices(group)) for group in GROUPS)
    assert not [path for path in FILES if len(path.parts) > 2]


def test_defaults_hold_what_runs_without_a_network():
    cfg = compose([])
    assert cfg.data._target_ == "clfed.data.glyphs.load" and cfg.engine._target_.endswith("local")
    assert cfg.run_dir is None and not cfg.overwrite and not cfg.smoke


@pytest.mark.parametrize(
    "overrides",
    [
        ["experiment=nothing"],
        ["data.no_such_key=1"],
        ["job=7"],
        ["smoke=true", "+when_smoke={no_such_key: 1}"],
        ["cache_dir=${oc.env:CLFED_SURELY_NOT_SET}"],
        ["cache_dir=${no.such.key}"],
    ],
    ids=" ".join,
)
def test_what_does_not_compose_is_one_sentence(overrides):
    with pytest.raises(ConfigError) as caught:
        compose(overrides)
    assert len(str(caught.value).splitlines()) == 1


def test_settings_that_a_target_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="magic"):
        build({"_target_": "clfed.federated.engines.local", "magic": 1}, serve=print, nodes=1)
    options = {"encoder": None, "local": {}, "session": "s", "magic": 1}
    with pytest.raises(ConfigError, match="magic"):
        build({"_target_": "clfed.strategies.FedAvg", **options})
    with pytest.raises(ConfigError, match=r"clfed\.nowhere"):
        build({"_target_": "clfed.nowhere"})


def test_a_mistake_of_the_program_is_not_blamed_on_the_settings():
    def serve(grid):
        raise TypeError("f() got an unexpected keyword argument 'x'")

    with pytest.raises(TypeError, match="'x'"):
        build({"_target_": "clfed.federated.engines.local"}, serve=serve, nodes=1)
