"""Counts over the greedy answers of one exam, and how sure one may be of them."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from distill_jax.answers import read_original, same_original
from distill_jax.records import GREEDY, Attempt, Question

Z95 = 1.959963984540054  # standard normal quantile of a two-sided 95% interval


@dataclass(frozen=True, slots=True)
class Marks:
    """The greedy answers to Q >= 1 questions, counted.

    Attributes:
      num_questions: Q.
      num_correct: Right answers.
      num_unreadable: Answers that could not be read; wrong, too.
      num_cut: Texts that the token limit ended.
      num_tokens: Tokens generated for all of them.
      num_original: Right by the original code's rule (string match), or None if not asked for.
    """

    num_questions: int
    num_correct: int
    num_unreadable: int
    num_cut: int
    num_tokens: int
    num_original: int | None

    @property
    def accuracy(self) -> float:
        return self.num_correct / self.num_questions

    @property
    def error_rate(self) -> float:
        return 1 - self.num_correct / self.num_questions

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of `accuracy`."""
        return wilson(self.num_correct, self.num_questions)

    @property
    def original_accuracy(self) -> float | None:
        if self.num_original is None:
            return None
        return self.num_original / self.num_questions


def greedy(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The answers that count: one per question."""
    return [attempt for attempt in attempts if attempt.sample_index == GREEDY]


def mark(attempts: Sequence[Attempt], questions: Mapping[str, Question] | None = None) -> Marks:
    """Counts one exam.

    Args:
      attempts: Greedy attempts, one per question, at least one.
      questions: The questions by id, for the original code's rule; it is left out without them.
    """
    return Marks(
        num_questions=len(attempts),
        num_correct=sum(attempt.correct for attempt in attempts),
        num_unreadable=sum(attempt.answer is None for attempt in attempts),
        num_cut=sum(attempt.cut for attempt in attempts),
        num_tokens=sum(attempt.num_tokens for attempt in attempts),
        num_original=None if questions is None else _count_original(attempts, questions),
    )


def mark_groups(attempts: Sequence[Attempt], questions: Mapping[str, Question]) -> dict[str, Marks]:
    """One `Marks` for each group of questions, by name; empty if the questions have no groups."""
    groups: defaultdict[str, list[Attempt]] = defaultdict(list)
    for attempt in attempts:
        groups[questions[attempt.question_id].group].append(attempt)
    return {name: mark(groups[name]) for name in sorted(groups)} if set(groups) != {""} else {}


def _count_original(attempts: Sequence[Attempt], questions: Mapping[str, Question]) -> int:
    asked = ((attempt, questions[attempt.question_id]) for attempt in attempts)
    return sum(same_original(read_original(a.text, q.kind), q.answer) for a, q in asked)


def wilson(num_correct: int, num_questions: int) -> tuple[float, float]:
    """The 95% interval of a share, which stays within 0 and 1.

    Source:
      Wilson, "Probable inference, the law of succession, and statistical inference" (JASA 1927).

    Example:
      >>> [round(bound, 3) for bound in wilson(0, 20)]
      [0.0, 0.161]
    """
    if not 0 <= num_correct <= num_questions or not num_questions:
        raise ValueError(f"of {num_questions} questions, {num_correct} can't be right.")
    share, n = num_correct / num_questions, num_questions
    scale = 1 + Z95**2 / n
    middle = (share + Z95**2 / (2 * n)) / scale
    half = Z95 * math.sqrt(share * (1 - share) / n + Z95**2 / (4 * n**2)) / scale
    # at 0 and at n right the bound is the share itself, but for rounding
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


@dataclass(frozen=True, slots=True)
class Change:
    """The same questions answered twice: how many turned right, how many turned wrong."""

    num_gained: int
    num_lost: int

    @property
    def p_value(self) -> float:
        """McNemar's exact two-sided test that gains and losses are equally likely."""
        n, fewer = self.num_gained + self.num_lost, min(self.num_gained, self.num_lost)
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)


def compare(before: Sequence[Attempt], after: Sequence[Attempt]) -> Change:
    """What changed between two exams, over the questions that both asked."""
    was = {attempt.question_id: attempt.correct for attempt in before}
    pairs = [(was[a.question_id], a.correct) for a in after if a.question_id in was]
    return Change(
        num_gained=sum(new and not old for old, new in pairs),
        num_lost=sum(old and not new for old, new in pairs),
    )
