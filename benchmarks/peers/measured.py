"""Runs a command and writes what it took: `python measured.py REPORT.json COMMAND …`.

The peak is that of the process itself. A large process must not start it directly: until the new program is loaded a
child shares its parent's memory, and that counts as its own. This one is small.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def main() -> None:
    report, *command = sys.argv[1:]
    began = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    found = {
        "seconds": time.monotonic() - began,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": 1024 * usage.ru_maxrss,
    }
    Path(report).write_text(json.dumps(found))
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
