"""What to lower when a device runs out of memory, and what each change would save."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict

import jax
from jax.sharding import Mesh

from distill_jax.config import Config
from distill_jax.config_file import override
from distill_jax.layouts import Axes
from distill_jax.plan.memory import Memory, count_memory
from distill_jax.plan.work import Texts
from distill_jax.run_folder import ANOTHER_FOLDER
from distill_jax.student.model import ModelConfig

SAVE_IN_EXAM = (
    "exam.slots bounds the answers that are written at the same time: set it, and halve it until "
    "they fit. Nothing is lost: run again, and the exam goes on with what is missing."
)


class OutOfMemory(RuntimeError):
    """A device can't hold a step; names what to lower, and what each change would save."""

    exit_code = 2


@contextmanager
def explained(advice: Callable[[], str]) -> Iterator[None]:
    """Turns the runtime's error that a device has no memory left into one that says what helps.

    Args:
      advice: Says it; called in that case only.

    Raises:
      OutOfMemory: a device ran out of memory.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not str(error).startswith("RESOURCE_EXHAUSTED"):
            raise
        raise OutOfMemory(f"a device ran out of memory. {advice()}") from error


def save_in_training(config: Config, model: ModelConfig, texts: Texts, mesh: Mesh) -> str:
    """What a step needs of each device by our count, and what would take less.

    Args:
      config: As it was run.
      model: The student.
      texts: Lengths of what is asked.
      mesh: Where it was run.
    """
    axes = (mesh.shape["data"], mesh.shape["fsdp"], mesh.shape["tensor"])
    device = mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    memory = count_memory(config, model, texts, axes)
    has = f", which has {_size(limit)}" if limit else ""
    parts = ", ".join(f"{name} {_size(value)}" for name, value in asdict(memory).items())
    saved = [
        f"{change} saves {_size(memory.total - less.total)}"
        for change, less in _smaller(config, model, texts, axes)
        if less.total < memory.total
    ]
    lower = "student.compute_dtype=bfloat16"
    other = f" For {lower} {ANOTHER_FOLDER}." if any(lower in words for words in saved) else ""
    return (
        f"By our count a step takes {_size(memory.total)} of a "
        f"{device.device_kind}{has}: {parts}. {'; '.join(saved) or 'No setting takes less'}. "
        f"Nothing is lost: set one of these, or several, and run again.{other}"
    )


def _smaller(
    config: Config, model: ModelConfig, texts: Texts, axes: Axes
) -> Iterator[tuple[str, Memory]]:
    """Single changes, and what a step takes with each."""
    rows, (data, fsdp, tensor) = config.train.microbatch_size, axes
    changes = [f"train.microbatch_size={rows // 2}"] * (rows % 2 == 0)
    changes += ["train.remat=full"] * (config.train.remat != "full")
    changes += ["student.compute_dtype=bfloat16"] * (config.student.compute_dtype != "bfloat16")
    for change in changes:
        yield change, count_memory(override(config, [change]), model, texts, axes)
    wider = (data, 2 * fsdp, tensor)
    yield f"mesh.fsdp={2 * fsdp} on as many devices", count_memory(config, model, texts, wider)


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.2f} MB"
