"""Where the figures of training go besides `metrics.jsonl`: the trackers that a user asks for.

`metrics.jsonl` is the record and a sink is a copy of it: one that fails is left alone from then on,
with a line that says so, and the run goes on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Protocol

from distill_jax.config import ConfigError

SinkName = Literal["tensorboard", "wandb"]

Send = Callable[[Mapping[str, float | int]], None]
"""Hands a line of `metrics.jsonl` to every sink that still works."""


class Sink(Protocol):
    """One tracker, open for one round."""

    def add(self, step: int, figures: Mapping[str, float | int]) -> None: ...

    def close(self) -> None: ...


_PACKAGES: dict[SinkName, str] = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_sinks(names: Sequence[SinkName]) -> None:
    """Sees that what is asked for is installed, before anything is spent.

    Raises:
      ConfigError: it is not.
    """
    for name in names:
        if find_spec(_PACKAGES[name]) is None:
            raise ConfigError(
                f"--sink {name} needs the package {_PACKAGES[name]}, which is not installed; "
                "pip install 'distill_jax[sinks]', or leave the option out."
            )


@contextmanager
def open_sinks(
    names: Sequence[SinkName], folder: Path, *, done: int, note: Callable[[str], None]
) -> Iterator[Send]:
    """Opens the sinks of a round while the `with` block runs.

    Args:
      names: Which.
      folder: The round's folder. TensorBoard's files go beside it, `tensorboard/round_01`; in
        W&B the rounds of a run are a group.
      done: Steps that were logged before an interruption; later ones are written anew.
      note: Says that a sink failed.
    """
    sinks: dict[SinkName, Sink] = {}

    @contextmanager
    def forgiving(name: SinkName) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracker raises: its server may be gone
            sinks.pop(name, None)
            note(f"{name} failed, and gets no more figures: {error!r}. metrics.jsonl has them all.")

    def send(row: Mapping[str, float | int]) -> None:
        figures = {key: value for key, value in row.items() if key not in ("round", "step")}
        for name in list(sinks):
            with forgiving(name):
                sinks[name].add(int(row["step"]), figures)

    for name in names:
        with forgiving(name):
            sinks[name] = _OPEN[name](folder, done)
    try:
        yield send
    finally:
        for name in list(sinks):
            with forgiving(name):
                sinks[name].close()


class _TensorBoard:
    def __init__(self, folder: Path, done: int):
        from tensorboardX import SummaryWriter  # optional, and slow to import

        place = folder.parent / "tensorboard" / folder.name
        self._writer: Any = SummaryWriter(
            str(place), purge_step=done or None, filename_suffix=f".from_{done}"
        )

    def add(self, step: int, figures: Mapping[str, float | int]) -> None:
        for key, value in figures.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: Path, done: int):
        import wandb  # optional, and slow to import

        run = folder.parent.resolve()
        self._run: Any = wandb.init(
            project="distill_jax", group=run.name, name=f"{run.name} {folder.name}", dir=str(run),
            reinit="create_new",
        )  # fmt: skip

    def add(self, step: int, figures: Mapping[str, float | int]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[SinkName, Callable[[Path, int], Sink]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}
