"""The commands that look after a run's ledger."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from distill_jax.run_arguments import RunFolder

ledger = typer.Typer(no_args_is_help=True, help="What was asked of the teacher, and what it cost.")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _path(run: Path) -> Path:
    """The ledger of a run, or the file itself."""
    path = run if run.is_file() else run / "ledger.sqlite"
    if not path.exists():
        raise ValueError(f"{run} has no ledger: there is no file {path}.")
    return path


def _print(facts: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, ensure_ascii=False))
        return
    from distill_jax.progress import one_line

    for name, value in facts.items():
        if isinstance(value, list):
            print(f"{name.replace('_', ' ')}:")
            for item in value:
                print(f"  {one_line(_words(item))}")
        else:
            print(f"{name.replace('_', ' ')}: {one_line(_words(value))}")


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_words(item)}" for name, item in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


@ledger.command()
def show(run: RunFolder, as_json: AsJson = False) -> None:
    """Requests, answers, failures and dollars, by model."""
    from dataclasses import asdict

    from distill_jax.teacher.audit import read_failures, read_model_uses, read_totals

    path = _path(run)
    facts = {
        **asdict(read_totals(path)),
        "failures": read_failures(path),
        "models": [asdict(use) for use in read_model_uses(path)],
    }
    _print(facts, as_json)


@ledger.command()
def verify(run: RunFolder, as_json: AsJson = False) -> None:
    """Check the file, every answer against its hash, and the sums. Exit code 1 if not sound."""
    from distill_jax.teacher.audit import verify as find_problems

    problems = find_problems(_path(run))
    _print({"sound": not problems, "problems": problems}, as_json)
    raise SystemExit(bool(problems))


@ledger.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="The JSONL file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write every answer with its request, cost and provenance as JSONL."""
    from distill_jax.teacher.audit import export as write

    _print({"file": str(to), "answers": write(_path(run), to)}, as_json)


@ledger.command()
def gc(run: RunFolder, as_json: AsJson = False) -> None:
    """Forget failures, so that they are asked again, and give back room. Answers stay."""
    from distill_jax.mirror import hold
    from distill_jax.progress import Progress
    from distill_jax.teacher.audit import collect_garbage

    path = _path(run)
    with hold(path.parent, Progress().note):
        forgotten = collect_garbage(path)
    _print(forgotten, as_json)


@ledger.command()
def replay(
    run: RunFolder,
    to: Annotated[Path | None, typer.Option(help="A JSONL file for the rows.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read a run's lessons again with today's reader of answers. Asks and costs nothing."""
    from distill_jax.replay import replay_run

    _print(replay_run(run, to=to), as_json)
