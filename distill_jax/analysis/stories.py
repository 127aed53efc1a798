"""Questions one by one, through all rounds of one run or several: the paper's tables 2, 13, 14."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from distill_jax.progress import printable
from distill_jax.records import Attempt, Question, Rationale, to_json
from distill_jax.report.cases import evenly, shorten
from distill_jax.report.figures import letter
from distill_jax.report.files import finished_rows, round_folders
from distill_jax.report.marks import greedy
from distill_jax.report.summary import read_questions
from distill_jax.report.table_files import plain_markdown


class Fate(StrEnum):
    """What became of a training question over a run's exams."""

    MENDED = "mended"  # wrong in some exam, right in the last
    UNMENDED = "unmended"  # wrong in all
    FORGOTTEN = "forgotten"  # right in some exam, wrong in the last
    ALWAYS_RIGHT = "always-right"


@dataclass(frozen=True, slots=True)
class Chapter:
    """A round: what the student said in the exam that opened it, and what the teacher said then."""

    round_index: int
    attempt: Attempt
    rationales: tuple[Rationale, ...]


@dataclass(frozen=True, slots=True)
class Story:
    """One training question in one run; a chapter for every round whose exam it sat."""

    run: Path
    question: Question
    chapters: tuple[Chapter, ...]

    @property
    def fate(self) -> Fate:
        right = [chapter.attempt.correct for chapter in self.chapters]
        if all(right):
            return Fate.ALWAYS_RIGHT
        if right[-1]:
            return Fate.MENDED
        return Fate.FORGOTTEN if any(right) else Fate.UNMENDED


def read_stories(folder: Path) -> dict[str, Story]:
    """The stories of all training questions of a run, by question.

    Raises:
      ValueError: there is no run, or no exam on the training questions has been finished.
    """
    if not (folder / "config.yaml").exists():
        raise ValueError(f"{folder} holds no run: a run folder has a config.yaml.")
    chapters: dict[str, list[Chapter]] = {}
    for index, path in round_folders(folder).items():
        taught: dict[str, list[Rationale]] = {}
        for row in finished_rows(path, "lesson", Rationale):
            taught.setdefault(row.question_id, []).append(row)
        for attempt in greedy(finished_rows(path, "exam", Attempt)):
            said = tuple(taught.get(attempt.question_id, ()))
            chapters.setdefault(attempt.question_id, []).append(Chapter(index, attempt, said))
    if not chapters:
        raise ValueError(f"{folder} has finished no exam on the training questions yet.")
    questions = read_questions(folder)
    return {key: Story(folder, questions[key], tuple(each)) for key, each in chapters.items()}


def choose_stories(
    folders: Sequence[Path], *, question: str = "", fate: str = "", number: int = 10
) -> list[list[Story]]:
    """Questions to show, each with its stories in all runs that have it.

    Args:
      folders: Runs; the first decides which questions.
      question: The id of the only question to show, or `""`.
      fate: Only questions that came to this in the first run, one of `Fate`; `""` takes all.
      number: At most so many, evenly spaced in question order.

    Raises:
      ValueError: as `read_stories`; or there is no such fate, or no such question in the first run.
    """
    if fate and fate not in set(Fate):
        raise ValueError(f"a question's fate is one of {', '.join(Fate)}; got {fate!r}.")
    runs = [read_stories(folder) for folder in folders]
    first = runs[0]
    if question and question not in first:
        raise ValueError(
            f"{folders[0]} has no training question {question!r}, only such as "
            f"{next(iter(first))!r}."
        )
    keys = [question] if question else [k for k, s in first.items() if fate in ("", s.fate)]
    chosen = evenly(keys, number)
    return [
        [run[key] for run in runs if key in run and run[key].question == first[key].question]
        for key in chosen
    ]


def tell(stories: Sequence[Sequence[Story]]) -> str:
    """The stories as Markdown, in which what models wrote is quoted and can do nothing."""
    runs = dict.fromkeys(story.run for each in stories for story in each)
    names = {run: letter(index) for index, run in enumerate(runs)}
    lines = [f"{name}: {plain_markdown(str(run))}" for run, name in names.items()]
    for each in stories:
        question = each[0].question
        lines += ["", f"## {plain_markdown(question.id)}", "", *_quoted(question.text)]
        lines += [
            f"> ({'abcdefghij'[i]}) {plain_markdown(c)}" for i, c in enumerate(question.choices)
        ]
        lines += ["", f"Gold answer: {plain_markdown(question.answer)}"]
        for story in each:
            for chapter in story.chapters:
                lines += _told(chapter, names[story.run])
            lines += ["", f"{names[story.run]}: {story.fate}"]
    return "\n".join(lines) + "\n"


def _told(chapter: Chapter, run: str) -> Iterator[str]:
    attempt = chapter.attempt
    mark = "right" if attempt.correct else "wrong"
    answer = "unreadable" if attempt.answer is None else f"answer {plain_markdown(attempt.answer)}"
    yield from ("", f"**{run}, student after round {attempt.round_index}** ({mark}, {answer})", "")
    yield from _quoted(attempt.text)
    for rationale in chapter.rationales:
        yield from (
            "",
            f"**{run}, teacher in round {chapter.round_index}** ({rationale.verdict})",
            "",
        )
        yield from _quoted(rationale.text)


def _quoted(text: str) -> list[str]:
    """The text as a block of code inside a quotation: nothing in it is markup."""
    return [f">     {line}" for line in printable(shorten(text)).splitlines() or [""]]


def stories_json(stories: Sequence[Sequence[Story]]) -> list[dict[str, Any]]:
    """The stories as a command prints them under `--json`."""
    return [
        {
            "question": to_json(each[0].question),
            "runs": [
                {
                    "run": str(story.run),
                    "fate": str(story.fate),
                    "rounds": [
                        {
                            "round": chapter.round_index,
                            "attempt": to_json(chapter.attempt),
                            "rationales": [to_json(row) for row in chapter.rationales],
                        }
                        for chapter in story.chapters
                    ],
                }
                for story in each
            ],
        }
        for each in stories
    ]
