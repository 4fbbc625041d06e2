"""`python -m autoglm_compress`, which launchers such as `torchrun -m autoglm_compress run …` start."""

from autoglm_compress.cli import app

app()
