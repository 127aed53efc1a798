"""What commands keep on this machine between them."""

import os
import platform
from pathlib import Path


def keep_compiled() -> None:
    """Keeps compiled programs; to be called before jax is imported."""
    # those of other machines may not run here
    home = Path("~/.cache/distill_jax/compiled").expanduser() / platform.node()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(home))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    # transformers reads tokenizers here, and need not say that its models want another framework
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
