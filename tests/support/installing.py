"""The package as a user has it: built and installed, where the dependencies are visible and the checkout is not."""

import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from support.places import ROOT

MODELS = ["reference_model/checkpoint", "reference_model/omni/checkpoint", "reference_model/omni/data"]
BUILT_FROM = ["autoglm_compress", "recipes", "calib_data", *MODELS]
CARDS = ["reference_model/README.md", "reference_model/omni/README.md"]
FILES = ["pyproject.toml", "setup.py", "README.md", "LICENSE", *CARDS]
PIP = ("-m", "pip", "--quiet", "--disable-pip-version-check")
OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and an empty folder in which its commands are given."""

    root: Path
    empty: Path

    def run(self, *command: object) -> str:
        """What a command of the environment prints."""
        clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        program, *arguments = map(str, command)
        done = subprocess.run(
            [self.root / "bin" / program, *arguments], cwd=self.empty, env=clean, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def install(self, *what: object) -> None:
        """Install a wheel or a folder, reaching for no index."""
        self.run("python", *PIP, "install", *OFFLINE, "--ignore-installed", *what)


def sources(target: Path) -> Path:
    """A copy of what the package is built from: builds leave folders behind."""
    for folder in BUILT_FROM:
        shutil.copytree(ROOT / folder, target / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in FILES:
        shutil.copy(ROOT / file, target / file)
    return target


def wheel(source: Path, target: Path) -> Path:
    """The wheel that is built of a folder."""
    subprocess.run([sys.executable, *PIP, "wheel", *OFFLINE, "--wheel-dir", str(target), str(source)], check=True)
    [built] = target.glob("*.whl")
    return built


def environment(folder: Path) -> Environment:
    """An environment that sees the packages installed here, but no checkout that one of their .pth files points at."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
    [packages] = (folder / "venv" / "lib").glob("python*/site-packages")
    # Folders that a .pth file adds are searched, and .pth files in them are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "empty").mkdir()
    return Environment(folder / "venv", folder / "empty")
