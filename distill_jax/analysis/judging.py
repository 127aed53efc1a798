"""How good a judge finds the student's rationales, right and wrong, round by round: table 6.

The judge is any endpoint that a teacher could be, and is asked in the same way: through a ledger,
under a budget. The ledger is its own, so a run's spending stays the run's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.analysis.findings import Findings
from distill_jax.config import TUTOR, ConfigError, TeacherConfig, is_free
from distill_jax.config_file import load_config, override
from distill_jax.progress import Progress
from distill_jax.prompts import scoring_prompt
from distill_jax.records import Attempt, Question
from distill_jax.report.cases import evenly
from distill_jax.report.files import finished_rows, round_folders
from distill_jax.report.headline import NOT_KNOWN
from distill_jax.report.marks import greedy
from distill_jax.report.published import TABLE_6
from distill_jax.report.tables import Table
from distill_jax.run_folder import read_records, write_rows
from distill_jax.teacher.account import Ask
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger

LEDGER = "judge.sqlite"
PROMPTS = "judge.jsonl"
_SCORE = re.compile(r"(?i)score\W{0,4}([1-5])\b(?!\.\d)")
_ALONE = re.compile(r"\s*([1-5])\s*")


@dataclass(frozen=True, slots=True)
class Case:
    """A rationale to judge."""

    question: Question
    attempt: Attempt

    @property
    def prompt(self) -> str:
        return scoring_prompt(self.question, self.attempt.text)


def judge_run(
    folder: Path,
    settings: Sequence[str],
    *,
    number: int = 100,
    repeats: int = 3,
    to: Path,
    progress: Progress,
) -> Findings:
    """Has the greedy answers of every exam on the training questions judged, from 1 to 5.

    This costs what the judge charges, at most `teacher.budget_usd`. Equal prompts are asked once,
    and what the ledger holds is never asked again.

    Args:
      folder: The run.
      settings: `teacher.url=...`, `teacher.model=...` and others of the section `teacher` that say
        who judges, at what price and within which budget; the run's own where they say nothing.
      number: Right rationales of each exam, at most, and wrong ones; evenly spaced.
      repeats: How often each is judged; the spread is taken over these.
      to: Where the ledger `judge.sqlite` lies, and `judge.jsonl`: every prompt with its scores.
      progress: Where to show it.

    Raises:
      ConfigError: a setting is not of the teacher, the judge is the tutor, or there is no exam.
      TeacherError: as `TeacherClient.complete`; what was paid for is in the ledger, and the same
        call goes on from there.
    """
    teacher = _choose_judge(folder, settings)
    cases = _choose_cases(folder, number)
    slots = tuple(range(repeats))
    asks = [Ask(case.prompt, slots) for case in cases]
    to.mkdir(parents=True, exist_ok=True)
    with (
        Ledger(to / LEDGER) as ledger,
        progress.stage("judging", total=len(asks), unit="rationales") as advance,
    ):
        client = TeacherClient(teacher, ledger, url=teacher.url, free=is_free(teacher.url))
        answers = client.complete(asks, advance=advance)
        spent = ledger.spent_usd
    scores = [[read_score(completion.text) for completion in each] for each in answers]
    rows = [_row(case, each) for case, each in zip(cases, scores, strict=True)]
    write_rows(to / PROMPTS, rows)
    task = load_config(folder / "config.yaml").task.name
    found = _summarise(rows, repeats)
    unreadable = sum(score is None for each in scores for score in each)
    return Findings(
        tables=[_table(found, task)],
        facts={
            "run": str(folder),
            "judge": teacher.model,
            "spent_usd": spent,
            "unreadable": unreadable,
            "rounds": found,
        },
        notes=[
            f"{unreadable:,} of {len(asks) * repeats:,} judgements never came or hold no score; "
            f"they count nowhere. Prompts and scores: {to / PROMPTS}."
        ],
    )


def _choose_judge(folder: Path, settings: Sequence[str]) -> TeacherConfig:
    if not (folder / "config.yaml").exists():
        raise ConfigError(f"{folder} holds no run: a run folder has a config.yaml.")
    strange = [setting for setting in settings if not setting.startswith("teacher.")]
    if strange:
        raise ConfigError(f"only settings of the teacher say who judges; got {strange[0]!r}.")
    teacher = override(load_config(folder / "config.yaml"), settings).teacher
    if teacher.url == TUTOR:
        raise ConfigError(
            "the built-in tutor explains and can't judge: set teacher.url and teacher.model."
        )
    return teacher


def _choose_cases(folder: Path, number: int) -> list[Case]:
    """Some right and some wrong greedy answers of every exam on the training questions."""
    questions = {row.id: row for row in read_records(folder / "questions.jsonl", Question)}
    cases = []
    for path in round_folders(folder).values():
        exam = greedy(finished_rows(path, "exam", Attempt))
        for right in (True, False):
            chosen = evenly([attempt for attempt in exam if attempt.correct == right], number)
            cases += [Case(questions[attempt.question_id], attempt) for attempt in chosen]
    if not cases:
        raise ConfigError(f"{folder} has finished no exam on the training questions yet.")
    return cases


def read_score(text: str) -> int | None:
    """The last score that a judge names, or the number that is all it says; None without one.

    Example:
      >>> read_score("Score: 1? No.\\nScore: 4"), read_score("5"), read_score("good")
      (4, 5, None)
    """
    named = _SCORE.findall(text)
    alone = _ALONE.fullmatch(text)
    return int(named[-1]) if named else int(alone[1]) if alone else None


def _row(case: Case, scores: Sequence[int | None]) -> dict[str, Any]:
    return {
        "round": case.attempt.round_index,
        "question_id": case.question.id,
        "correct": case.attempt.correct,
        "prompt": case.prompt,
        "scores": list(scores),
    }


def _summarise(rows: Sequence[dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """By round and by right or wrong: the mean over repeats, and their standard deviation."""
    found = []
    for index in sorted({row["round"] for row in rows}):
        entry: dict[str, Any] = {"round": index}
        for name, right in (("right", True), ("wrong", False)):
            mine = [
                row["scores"] for row in rows if (row["round"], row["correct"]) == (index, right)
            ]
            means = [
                float(np.mean(known))
                for repeat in range(repeats)
                if (known := [scores[repeat] for scores in mine if scores[repeat] is not None])
            ]
            entry[name] = {
                "rationales": len(mine),
                "score": float(np.mean(means)) if means else None,
                "deviation": float(np.std(means, ddof=1)) if len(means) > 1 else None,
            }
        found.append(entry)
    return found


def _table(found: Sequence[dict[str, Any]], task: str) -> Table:
    paper = TABLE_6.get(task, ())
    rows = []
    for entry in found:
        told = paper[entry["round"]] if entry["round"] < len(paper) else None
        rows.append(
            (
                str(entry["round"]),
                *(
                    cell
                    for name in ("right", "wrong")
                    for cell in (f"{entry[name]['rationales']:,}", _score_words(entry[name]))
                ),
                NOT_KNOWN if told is None else f"{told[0]:.2f} / {told[1]:.2f}",
            )
        )
    columns = ("after round", "right", "score", "wrong", "score", "paper: right / wrong")
    note = (
        "Mean scores from 1 to 5 with their standard deviation over repeated judgements. The "
        "paper's judge was GPT-4, with a prompt that is not published."
    )
    return Table("Judged rationales", columns, tuple(rows), note)


def _score_words(entry: dict[str, Any]) -> str:
    if entry["score"] is None:
        return NOT_KNOWN
    spread = "" if entry["deviation"] is None else f" ± {entry['deviation']:.2f}"
    return f"{entry['score']:.2f}{spread}"
