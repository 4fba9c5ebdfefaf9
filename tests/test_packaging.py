"""What is installed works from any folder: wheel, checkout and Flower app bundle."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import sys
from pathlib import Path
import clfed, clfed.strategies
from clfed.config import choices, compose, config_dir
assert "torch" in sys.modules  # a strategy needs it, and only now is it here
assert Path(clfed.__file__).is_relative_to(sys.argv[1]), clfed.__file__
assert Path(clfed.strategies.__file__).is_relative_to(sys.argv[1]), clfed.strategies.__file__
assert config_dir().is_relative_to(sys.argv[1]), config_dir()
assert clfed.strategies.PrototypeAveraging.__module__ == "clfed.strategies.prototype_averaging"
assert compose(["seed=3"]).seed == 3
assert dict(choices("experiment"))
print("fine")
"""


def probe(place: Path, cwd: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(place), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PROBE, str(place)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout.strip() or done.stderr


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of what is under version control, so that building leaves no trace in the checkout."""
    folder = tmp_path_factory.mktemp("copy") / "clfed-app"
    keep = ("clfed", "strategies", "conf", "pyproject.toml", "README.md", "LICENSE", ".gitignore")
    folder.mkdir()
    for name in keep:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.is_file():
            shutil.copy(source, folder / name)
    return folder


def test_every_package_is_listed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {p.parent for p in (ROOT / "clfed").rglob("*.py")}
    found = {".".join(p.relative_to(ROOT).parts) for p in folders}
    assert set(listed) == found | {"clfed.strategies", "clfed.conf"}


def test_checkout_is_found_without_installation(tmp_path):
    assert probe(ROOT, tmp_path) == "fine"


@pytest.mark.slow
def test_wheel_works_from_any_folder_beside_a_users_own_strategies(copy, tmp_path):
    wheels, place, work = tmp_path / "wheels", tmp_path / "site", tmp_path / "work"
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(wheels), "."]
    subprocess.run(build, cwd=copy, check=True, timeout=300)
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    assert not (place / "strategies").exists()
    (work / "strategies").mkdir(parents=True)
    (work / "strategies" / "__init__.py").write_text("MINE = 1\n")
    assert probe(place, work) == "fine"


@pytest.mark.slow
def test_flower_app_bundle_carries_strategies_and_configuration(copy, tmp_path):
    flwr = Path(sys.executable).parent / "flwr"
    environment = {**os.environ, "FLWR_HOME": str(tmp_path), "FLWR_TELEMETRY_ENABLED": "0"}
    subprocess.run(
        [flwr, "build", "--app", str(copy)], cwd=tmp_path, check=True, timeout=120, env=environment
    )
    (bundle,) = tmp_path.glob("*.fab")
    place = tmp_path / "bundle"
    with zipfile.ZipFile(bundle) as archive:
        archive.extractall(place)
    assert probe(place, tmp_path) == "fine"


def test_importing_the_folder_under_its_own_name_is_refused():
    done = subprocess.run(
        [sys.executable, "-c", "import strategies"], cwd=ROOT, capture_output=True, text=True
    )
    assert "clfed.strategies" in done.stderr


@pytest.mark.parametrize("code", ["import clfed", "import clfed.cli; clfed.cli.help_text()"])
def test_nothing_heavy_is_imported_early(code):
    check = f"{code}; import sys; print(sorted({{'torch', 'lightning', 'flwr', 'wandb', 'hydra'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
