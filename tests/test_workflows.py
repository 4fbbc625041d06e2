"""The workflows for pull requests ask for what the Makefile and the package have, on every Python that it supports."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
PYPROJECT = (ROOT / "pyproject.toml").read_text()
SUPPORTED = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', PYPROJECT)
RULES = dict(re.findall(r"^([a-z]+):(.*(?:\n\t.*)*)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def jobs(workflow: Path) -> dict[str, dict[str, Any]]:
    return yaml.safe_load(workflow.read_text())["jobs"]


def pythons(job: dict[str, Any]) -> list[str]:
    """The Python versions that a job runs on."""
    [setup] = [step["with"] for step in job["steps"] if "setup-python" in step.get("uses", "")]
    if setup["python-version"] == "${{ matrix.python-version }}":
        return job["strategy"]["matrix"]["python-version"]
    return [setup["python-version"]]


def made(job: dict[str, Any]) -> list[str]:
    """The targets that a job makes."""
    return [target for step in job["steps"] for target in re.findall(r"^make (\w+)$", step.get("run", ""))]


def test_every_supported_python_is_tested():
    [tests] = [job for workflow in WORKFLOWS for job in jobs(workflow).values() if "test" in made(job)]
    assert pythons(tests) == SUPPORTED


def test_the_classifiers_begin_with_the_oldest_python_that_may_install_the_package():
    [required] = re.findall(r'^requires-python = "(.*)"', PYPROJECT, re.MULTILINE)
    versions = [Version(version) for version in SUPPORTED]
    assert all(version in SpecifierSet(required) for version in versions)
    assert Version(f"3.{versions[0].minor - 1}") not in SpecifierSet(required)
    assert [version.minor for version in versions] == list(range(versions[0].minor, versions[-1].minor + 1))


def test_types_and_style_are_those_of_the_oldest_python():
    oldest = SUPPORTED[0]
    assert f'python_version = "{oldest}"' in PYPROJECT
    assert f'target-version = "py{oldest.replace(".", "")}"' in PYPROJECT


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_makes_targets_that_there_are_on_pythons_that_are_supported(workflow: Path):
    for name, job in jobs(workflow).items():
        assert made(job), name
        assert set(made(job)) <= RULES.keys()
        assert set(pythons(job)) <= set(SUPPORTED)


def test_the_tests_include_lint_and_types():
    assert "lint" in RULES["test"].partition("\n")[0].split()
    assert "$(BIN)/ruff check ." in RULES["lint"]
    assert "$(BIN)/mypy" in RULES["lint"]


def test_every_pin_holds_once_on_every_python():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    for python in SUPPORTED:
        held = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert sorted(held) == sorted({pin.name for pin in pins}), python
