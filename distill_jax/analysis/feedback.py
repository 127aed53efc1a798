"""What showing the teacher the student's mistake is worth: the paper's table 3."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distill_jax.analysis.comparison import difference_cells, difference_json
from distill_jax.analysis.findings import Findings
from distill_jax.analysis.paired import Difference, compare_rows
from distill_jax.analysis.pooled import Run, identity, question_key, read_run
from distill_jax.records import Question, Rationale
from distill_jax.report.headline import percent
from distill_jax.report.marks import wilson
from distill_jax.report.published import TABLE_3
from distill_jax.report.summary import row_name
from distill_jax.report.tables import Table
from distill_jax.run_folder import read_records

_WORDS = {True: "with the mistake shown", False: "without"}


@dataclass(frozen=True, slots=True)
class Teaching:
    """One round's requests of one run, from round 2 on.

    Attributes:
      run: Whose.
      round_index: Which round.
      taught: For every question that the teacher was asked about, whether an answer was kept.
      num_asked: Answers asked for.
      num_kept: Answers kept.
    """

    run: Run
    round_index: int
    taught: Mapping[str, bool]
    num_asked: int
    num_kept: int

    @property
    def shown(self) -> bool:
        return self.run.config.teacher.feedback


def study_feedback(folders: Sequence[Path]) -> Findings:
    """Requests and successes of runs that show the teacher mistakes and of runs that don't.

    A request is a question that the teacher was asked about; it is a success when an answer was
    kept. Runs that differ in `teacher.feedback` alone are compared on the questions that both asked
    in the same round: in round 2 these are the same ones.

    Args:
      folders: Finished runs of at least two rounds.

    Raises:
      ValueError: no run has a second round, or a folder holds no finished run.
    """
    rounds = [each for folder in folders for each in read_teaching(read_run(folder))]
    if not rounds:
        raise ValueError(
            "mistakes are shown from round 2 on, and none of these runs has taught a second round."
        )
    pairs = list(_pairs(rounds))
    return Findings(
        tables=[_requests_table(rounds), _pairs_table(pairs), _paper_table(rounds)],
        facts={
            "rounds": [_teaching_json(each) for each in rounds],
            "pairs": [
                {
                    "with": str(shown.run.folder),
                    "without": str(hidden.run.folder),
                    "round": shown.round_index,
                    "same_questions": set(shown.taught) == set(hidden.taught),
                    **difference_json(difference),
                }
                for shown, hidden, difference in pairs
            ],
        },
        notes=list(_notes(pairs)),
    )


def read_teaching(run: Run) -> list[Teaching]:
    """The rounds of a run from the second on in which the teacher was asked."""
    questions = {row.id: row for row in read_records(run.folder / "questions.jsonl", Question)}
    found = []
    for path in sorted(run.folder.glob("round_*/lesson.jsonl")):
        index = int(path.parent.name.removeprefix("round_"))
        if index < 2:
            continue
        taught: dict[str, bool] = {}
        rows = read_records(path, Rationale)
        for row in rows:
            key = question_key(questions[row.question_id])
            taught[key] = taught.get(key, False) or row.verdict == "kept"
        kept = sum(row.verdict == "kept" for row in rows)
        found.append(Teaching(run, index, taught, len(rows), kept))
    return found


def _pairs(rounds: Sequence[Teaching]) -> Iterable[tuple[Teaching, Teaching, Difference]]:
    """Rounds with and without the mistake of runs that differ in nothing else, seed included."""
    hidden = {_place(each): each for each in rounds if not each.shown}
    for each in rounds:
        other = hidden.get(_place(each))
        if each.shown and other and set(each.taught) & set(other.taught):
            yield each, other, compare_rows([other.taught], [each.taught])


def _place(each: Teaching) -> tuple[str, int, int]:
    config = each.run.config
    return identity(config, besides=("teacher.feedback",)), config.seed, each.round_index


def _requests_table(rounds: Sequence[Teaching]) -> Table:
    rows = []
    for each in rounds:
        requests, successes = len(each.taught), sum(each.taught.values())
        low, high = wilson(successes, requests)
        rows.append(
            (
                row_name(each.run.folder),
                str(each.run.config.seed),
                str(each.round_index),
                _WORDS[each.shown],
                f"{requests:,}",
                f"{successes:,}",
                percent(successes / requests),
                f"{100 * low:.1f} to {100 * high:.1f}",
                f"{each.num_asked:,}",
                percent(each.num_kept / each.num_asked),
                percent(each.run.accuracy),
            )
        )
    columns = (
        *("run", "seed", "round", "teacher asked", "requests", "successes", "success"),
        *("95% interval", "answers asked", "kept", "test accuracy"),
    )
    note = (
        "A request is a question that the teacher was asked about, a success one of which an "
        "answer was kept. Test accuracy is that of the whole run."
    )
    return Table("Requests from round 2 on", columns, tuple(rows), note)


def _pairs_table(pairs: Sequence[tuple[Teaching, Teaching, Difference]]) -> Table:
    rows = tuple(
        (
            row_name(shown.run.folder),
            str(shown.run.config.seed),
            str(shown.round_index),
            f"{difference.num_questions:,}",
            *difference_cells(difference),
        )
        for shown, _, difference in pairs
    )
    columns = (
        *("run", "seed", "round", "questions", "difference", "95% interval"),
        *("taught only with / without", "p"),
    )
    note = "Points of success that showing the mistake adds, on questions that both asked."
    return Table("With the mistake against without", columns, rows, note)


def _paper_table(rounds: Sequence[Teaching]) -> Table:
    tasks = dict.fromkeys(each.run.config.task.name for each in rounds)
    rows = []
    for task in tasks:
        for place, words in enumerate(_WORDS.values()):
            if task in TABLE_3:
                told = TABLE_3[task]
                rows.append(
                    (
                        f"{task}, {words}",
                        f"{told.requests:,}",
                        f"{told.successes[place]:,}",
                        percent(told.successes[place] / told.requests),
                        f"{told.accuracy[place]:.1f}%",
                    )
                )
    columns = ("in the paper", "requests", "successes", "success", "test accuracy")
    return Table("Table 3 of the paper", columns, tuple(rows))


def _notes(pairs: Sequence[tuple[Teaching, Teaching, Difference]]) -> Iterable[str]:
    if not pairs:
        yield (
            "No two of these runs differ in teacher.feedback alone, so nothing here says what "
            "feedback does."
        )
    for shown, hidden, difference in pairs:
        asked = len(set(shown.taught) | set(hidden.taught))
        if difference.num_questions < asked:
            yield (
                f"Round {shown.round_index} of {row_name(shown.run.folder)}, seed "
                f"{shown.run.config.seed}: {difference.num_questions:,} of {asked:,} questions "
                "were asked by both."
            )


def _teaching_json(each: Teaching) -> dict[str, Any]:
    return {
        "run": str(each.run.folder),
        "round": each.round_index,
        "feedback": each.shown,
        "requests": len(each.taught),
        "successes": sum(each.taught.values()),
        "answers_asked": each.num_asked,
        "kept": each.num_kept,
        "test_accuracy": each.run.accuracy,
    }
