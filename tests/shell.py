"""The commands as a user's shell starts them."""

import os
import subprocess
import sys
from pathlib import Path


def command(*words: str | Path, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "distill_jax", *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ | variables,
        timeout=300,
    )
