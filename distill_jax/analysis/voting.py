"""Majority voting: finished runs set against themselves where most of several samples decide."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

from distill_jax.analysis.comparison import set_against_first
from distill_jax.analysis.findings import Findings
from distill_jax.analysis.pooled import Row, Run, pool, question_key, read_run
from distill_jax.exam import vote
from distill_jax.progress import Progress
from distill_jax.records import Attempt, Question, to_json
from distill_jax.report.marks import mark
from distill_jax.resit import resit
from distill_jax.run_folder import Partial, partial_path, read_records, stream_rows


def study_voting(folders: Sequence[Path], *, votes: int, progress: Progress) -> Findings:
    """Sets every row against the first, as its greedy answers and as what samples agree on.

    The chosen student of a run draws samples for its test questions. They are kept in
    `analysis/votes_K.jsonl` of the run as they come; the same call goes on after them.

    Args:
      folders: Finished runs. Those of one config are one row, whatever their seeds.
      votes: Samples that vote, at least 1. The greedy answer doesn't.
      progress: Where to show it.

    Raises:
      ConfigError: a run's questions or weights are not there any more.
      ValueError: a folder holds no finished run with a test exam, or a run is given twice.
    """
    rows: list[Row] = []
    for row in pool([read_run(folder) for folder in folders]):
        voted = tuple(_vote(run, votes, progress) for run in row.runs)
        rows += [row, Row(f"{row.name}, {votes} votes", voted)]
    found = set_against_first(rows, "test")
    note = (
        f"With votes a question is marked by what most of {votes} samples say, which takes {votes} "
        "times as many answers. Where no sample can be read it is wrong."
    )
    return replace(found, notes=[*found.notes, note])


def _vote(run: Run, votes: int, progress: Progress) -> Run:
    """The same run, marked by its votes."""
    questions = {row.id: row for row in read_records(run.folder / "questions.jsonl", Question)}
    attempts = read_records(_draw(run, votes, progress), Attempt)
    agreed = [
        vote([*group], questions[id].kind)
        for id, group in groupby(attempts, key=lambda attempt: attempt.question_id)
    ]
    return replace(
        run,
        marks={question_key(questions[each.question_id]): each.correct for each in agreed},
        original=mark(agreed, questions).original_accuracy or 0.0,
    )


def _draw(run: Run, votes: int, progress: Progress) -> Path:
    """The file of a run's votes, each question's together; draws those that are missing."""
    path = run.folder / "analysis" / f"votes_{votes}.jsonl"
    if path.exists():
        return path
    path.parent.mkdir(exist_ok=True)
    part = Partial(path)
    part.keep(len(part) - len(part) % (1 + votes))  # whole questions only
    done = {row["question_id"] for row in stream_rows(partial_path(path))}
    sitting = resit(
        run.config,
        run.folder,
        split="test",
        round_index=run.chosen_round,
        samples=votes,
        progress=progress,
        done=done,
    )
    for attempts in sitting:
        part.append(map(to_json, attempts))
    part.finish(path)
    return path
