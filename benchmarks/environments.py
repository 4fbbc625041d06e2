"""Virtual environments for what cannot be installed beside this package."""

import json
import subprocess
import venv
from collections.abc import Sequence
from pathlib import Path


def environment(folder: Path, calls: list[list[str]], unwanted: Sequence[str] = ()) -> Path:
    """The Python of an environment that these calls of `pip install` make, unless it was made already.

    `unwanted` are packages that come along, and are removed.

    Raises:
        CalledProcessError: a call failed.
    """
    python, ready = folder / "bin" / "python", folder / "installed.json"
    if not ready.exists() or json.loads(ready.read_text()) != calls:
        venv.create(folder, with_pip=True, clear=True)
        for arguments in calls:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
        if unwanted:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *unwanted], check=True)
        ready.write_text(json.dumps(calls))
    return python
