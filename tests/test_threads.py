"""How threads wait: they sleep soon, unless the user has said otherwise."""

import os
import subprocess
import sys

import pytest

from autoglm_compress.threads import SETTINGS, sleep_soon

REPORT = """
import os, sys
import autoglm_compress.cli as cli
assert "torch" not in sys.modules  # whose OpenMP reads the variables when it starts
from typer.testing import CliRunner
CliRunner().invoke(cli.app, ["plan", "nothing.yaml"])
print({name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")})
"""


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", *SETTINGS])
def test_what_the_user_has_set_is_left(name: str, monkeypatch: pytest.MonkeyPatch):
    for variable in ("OMP_WAIT_POLICY", *SETTINGS):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "ACTIVE")
    assert not sleep_soon()
    assert [variable for variable in SETTINGS if variable in os.environ] == [name] * (name in SETTINGS)


def test_commands_have_threads_sleep_soon():
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", REPORT], env=clean, capture_output=True, text=True, check=True)
    assert shown.stdout.strip().splitlines()[-1] == str(SETTINGS)
