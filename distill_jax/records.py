"""The rows that flow through a run: question, completion, attempt, rationale, lesson.

Letters: Q questions, S samples per question, N answers asked of the teacher.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar

T = TypeVar("T")

Split = Literal["train", "dev", "test"]
Kind = Literal["numeric", "choice", "yes_no", "text"]
FinishReason = Literal["stop", "length", "content_filter", "error"]
Form = Literal["rationale", "answer", "rationale_alone", "answer_alone"]
"""What the student is asked for, a rationale or the bare answer; `alone`: without examples."""
Verdict = Literal["kept", "wrong", "unreadable", "cut", "duplicate", "leak", "failed"]
Piece = tuple[str, tuple[tuple[str, float], ...]]
"""A token of a teacher's text, and how likely it was there: first itself, then what else it might
have said, each with its probability. () where that is not known."""

GREEDY = 0
"""`sample_index` of the greedy answer; the samples drawn at random are 1 to S."""


@dataclass(frozen=True, slots=True)
class Question:
    """A task item with a known answer.

    Attributes:
      id: Unique within its task, such as `"gsm8k/train/7"`. Never used as a file name.
      text: What is asked, without choices and without any prompt wording.
      answer: The gold answer: a number, a choice's lower-case letter, `Yes` or `No`, or free text.
      split: `train` may be taught, `dev` decides when to stop, `test` is sat by chosen rounds only.
      kind: How the answer is read and compared.
      choices: The texts of choices a, b, c ... in order; empty unless `kind` is `"choice"`.
      solution: A worked solution that ends in the gold answer, or `""`. Only the tutor reads it.
      group: Which sort of question it is within its task, or `""`: accuracy is also shown by group.
    """

    id: str
    text: str
    answer: str
    split: Split
    kind: Kind
    choices: tuple[str, ...] = ()
    solution: str = ""
    group: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """Raw text that a model returned.

    Attributes:
      text: The text, exactly as returned.
      finish_reason: `stop` at end-of-text or a blank line, `length` when cut by the token limit,
        `content_filter` or `error` when a teacher's answer never came.
      num_tokens: Tokens generated; 0 when nothing came.
      pieces: What the text was put together from, if the teacher said so.
    """

    text: str
    finish_reason: FinishReason
    num_tokens: int
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Attempt:
    """One marked completion of the student.

    Attributes:
      question_id: The question that was answered.
      round_index: The round whose weights answered: 0 is the untrained student.
      sample_index: `GREEDY` (0) for the greedy answer, 1 to S for those drawn at random.
      text: The completion as generated.
      answer: The predicted answer as read, or None if it could not be read.
      correct: Whether `answer` agrees with the gold answer. An unreadable answer is wrong.
      cut: Whether the token limit ended the text; counted apart from honest mistakes.
      num_tokens: Tokens generated.
    """

    question_id: str
    round_index: int
    sample_index: int
    text: str
    answer: str | None
    correct: bool
    cut: bool
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Rationale:
    """One answer of the teacher, marked; the student is trained on the kept ones only.

    Attributes:
      question_id: The question it answers.
      round_index: The round that it teaches, from 1.
      sample_index: Which of the teacher's samples it is, from 0.
      text: The reasoning, without the answer line that follows it.
      answer: The answer as read, or None.
      verdict: `kept`, or why not: `wrong` answer, `unreadable`, `cut` by the token limit,
        `duplicate` of a kept one, `leak` of the hint or the student's text, `failed` when no
        answer came.
      pieces: Of a kept one: what the whole answer was put together from, if the teacher said so.
    """

    question_id: str
    round_index: int
    sample_index: int
    text: str
    answer: str | None
    verdict: Verdict
    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one round of teaching gave: N rows, one per answer that was asked for.

    `num_asked == len(kept) + sum(rejected.values())`, always.
    """

    rows: tuple[Rationale, ...]

    @property
    def num_asked(self) -> int:
        """Answers asked of the teacher: questions times samples."""
        return len(self.rows)

    @property
    def kept(self) -> tuple[Rationale, ...]:
        """The rationales to train on, in the order asked."""
        return tuple(row for row in self.rows if row.verdict == "kept")

    @property
    def rejected(self) -> dict[str, int]:
        """How many were rejected, by verdict; verdicts that did not occur are absent."""
        return dict(Counter(row.verdict for row in self.rows if row.verdict != "kept"))


def to_json(record: object) -> dict:
    """The record as a JSON-ready dict, one key per field."""
    names, _ = _names(type(record))
    return {name: getattr(record, name) for name in names}


def from_json(kind: type[T], row: dict) -> T:
    """The record that `to_json` wrote, or wrote before a field that has a default was added.

    Raises:
      ValueError: the row's keys are not the record's fields.
    """
    names, needed = _names(kind)
    if not needed <= row.keys() <= names.keys():
        raise ValueError(f"a {kind.__name__} row has {sorted(names)}; got {sorted(row)}.")
    return kind(**{name: _frozen(value) for name, value in row.items()})


@cache
def _names(kind: type) -> tuple[dict[str, None], set[str]]:
    """The fields of a record, in order, and those that every row must have."""
    fields = dataclasses.fields(kind)
    needed = {field.name for field in fields if field.default is dataclasses.MISSING}
    return dict.fromkeys(field.name for field in fields), needed


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
