"""What every test shares: eight fake devices, strict ranks, and where the real data lies."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from fake_devices import fake_devices

os.environ.setdefault("XLA_FLAGS", fake_devices(8))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # what one test compiled serves the others
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="compiled_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real question sets, small real models and real tokenizers."""
    if not SHARED.is_dir():
        pytest.skip(f"needs real question sets and models in {SHARED}")
    return SHARED
