"""What the arguments RUN of commands may be: run folders of this machine, or in a bucket."""

from pathlib import Path
from typing import Annotated, no_type_check

import typer


def folder_here(run: str) -> Path:
    """The folder of this machine that a run is read or worked on in."""
    from distill_jax.bucket import local_folder

    return local_folder(run)


@no_type_check  # typer wants its own Context here, and hands over the one that it is made from
def _open(ctx: typer.Context, run: Path) -> Path:
    """The run's folder here, as long as the command runs."""
    from distill_jax.mirror import opened

    return ctx.with_resource(opened(run))


@no_type_check
def _open_all(ctx: typer.Context, runs: list[Path]) -> list[Path]:
    return [_open(ctx, run) for run in runs]


_HELP = "on this machine, or gs://BUCKET/NAME or s3://BUCKET/NAME."

RunFolder = Annotated[
    Path,
    typer.Argument(
        metavar="RUN", parser=folder_here, callback=_open, help=f"A run folder, {_HELP}"
    ),
]
RunFolders = Annotated[
    list[Path],
    typer.Argument(
        metavar="RUN...", parser=folder_here, callback=_open_all, help=f"Run folders, {_HELP}"
    ),
]
