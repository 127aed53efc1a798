"""Set-up that every test shares: eight fake devices, strict ranks, and where the real data lies."""

import os
from pathlib import Path

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

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
