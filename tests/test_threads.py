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


FROM_PYTHON = """
import os, sys
import autoglm_compress
assert "GOMP_SPINCOUNT" not in os.environ  # an import alone changes nothing
from autoglm_compress import UserError, run
print({name: os.environ.get(name) for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")})
"""


@pytest.mark.parametrize("program", [REPORT, FROM_PYTHON], ids=["command", "function"])
def test_commands_and_functions_have_threads_sleep_soon(program: str):
    clean = {name: value for name, value in os.environ.items() if name not in (*SETTINGS, "OMP_WAIT_POLICY")}
    shown = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    assert shown.stdout.strip().splitlines()[-1] == str(SETTINGS)
