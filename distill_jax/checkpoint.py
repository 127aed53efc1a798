"""Weights and optimiser state to disk and back, on any mesh.

Two kinds: a round's finished weights (`round_01/checkpoint`), and the train states that an
interrupted round continues from (`round_01/training`), written in the background.
"""

import logging
from pathlib import Path
from types import TracebackType
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from distill_jax.bucket import bucket_url
from distill_jax.mirror import bring
from distill_jax.processes import gather, is_main, tell
from distill_jax.student.model import Params
from distill_jax.student.step import TrainState

log = logging.getLogger(__name__)


def save_params(folder: Path, params: Params) -> None:
    """Writes finished weights; `folder` exists only once all of them are on disk."""
    remove(folder)
    gather("making way for the weights", None)
    with ocp.StandardCheckpointer() as writer:
        writer.save(_locate(folder), params)


def exists(folder: Path) -> bool:
    """Whether there is a checkpoint."""
    return _fetch(folder).exists()


def remove(folder: Path) -> None:
    """Deletes a checkpoint, or all those in a folder, if there is any."""
    place = _locate(folder)
    if is_main() and place.exists():
        place.rmtree()


def _locate(folder: Path) -> epath.Path:
    """Where Orbax writes: in Google's buckets by itself, to others from a folder that is copied."""
    url = bucket_url(folder)
    return epath.Path(url if url.startswith("gs:") else folder.resolve())


def _fetch(folder: Path) -> epath.Path:
    """Where Orbax reads; what it can't read in a bucket is in the folder then."""
    place = _locate(folder)
    if place == epath.Path(folder.resolve()):
        bring(folder)
    return place


def load_params(folder: Path, like: Params) -> Params:
    """Reads what `save_params` wrote.

    Args:
      folder: The checkpoint.
      like: A tree of `jax.ShapeDtypeStruct` with shardings: where the weights shall lie, whatever
        mesh wrote them.

    Raises:
      ValueError: the checkpoint holds other weights than `like` describes, or can't be read.
    """
    with ocp.StandardCheckpointer() as reader:
        return _restore(folder, lambda: reader.restore(_fetch(folder), like))


class TrainingCheckpoints:
    """The train states of one round in progress: the newest two, written in the background.

    Use it in a `with` statement: leaving it waits for the last write, without which the newest
    state would be lost.
    """

    def __init__(self, folder: Path):
        self._folder = _fetch(folder)
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True),
        )

    def __enter__(self) -> "TrainingCheckpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.close()

    def save(self, step: int, state: TrainState) -> None:
        """Starts to write `state`, which may be donated as soon as this returns."""
        saved = self._manager.save(step, args=ocp.args.StandardSave(state))
        assert saved, f"step {step} was saved before"

    def any(self) -> bool:
        """Whether a state was saved, which may not be readable."""
        return bool(self._steps())

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read, in the layout of `like`; None if there is none.

        A state that can't be read, such as a copy cut short, is named in the log and the one
        before it is taken.
        """
        for step in reversed(self._steps()):
            restored = None
            try:
                restored = _restore(
                    self._folder / str(step),
                    lambda step=step: self._manager.restore(
                        step, args=ocp.args.StandardRestore(like)
                    ),
                )
            except ValueError as error:
                log.warning("%s The state before it is used.", error)
            read = gather("reading a train state", restored is not None)
            if restored is not None and all(read):
                return TrainState(*restored)
            self._manager.delete(step)
        return None

    def _steps(self) -> list[int]:
        return tell("looking for train states", lambda: sorted(self._manager.all_steps()))


def _restore(folder: Path | epath.Path, read: Any) -> Any:
    """What `read` returns; whatever goes wrong in it becomes one sentence."""
    try:
        return read()
    except (ValueError, OSError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"checkpoint {folder} can't be read: {reason}.") from error
