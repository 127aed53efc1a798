"""Mistakes and a teacher in, rationales to train on and counts of the rest out."""

import heapq
import re
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from distill_jax.answers import read_answer, same_answer
from distill_jax.on_demand import OnDemand
from distill_jax.prompts import clean_rationale
from distill_jax.records import (
    Attempt,
    Completion,
    Question,
    Rationale,
    Verdict,
)
from distill_jax.teacher.account import Ask

Complete = Callable[[Sequence[Ask]], Sequence[Sequence[Completion]]]
Prompt = Callable[[Question, str | None], str]

_LONG_ENOUGH = 8  # words of a mistake, before repeating them is no accident
_TOLD = re.compile(  # the hint is spoken of: whoever reads this can't learn to do without it
    r"(?i)\bhints?\b|\b(?:given|provided|stated|known|expected|told)\b.{0,20}\banswer\b"
    r"|\banswer\b.{0,20}\b(?:is|was|as) (?:given|provided|stated|known|expected|told)\b"
    r"|\bfinal answer should be\b|\bgold answer\b"
)
_ANSWER_FIRST = re.compile(r"(?i)\W*(?:so,? )?the (?:final |correct )?answer (?:is|must be)\b")


def ask_teacher(
    questions: Sequence[Question],
    mistakes: Mapping[str, str],
    complete: Complete,
    *,
    prompt: Prompt,
    round_index: int,
    samples: int,
    extra_tries: int = 0,
    alternatives: int = 0,
) -> Iterator[Rationale]:
    """Asks the teacher about each question once and marks every answer.

    An answer is kept when it came whole, its final answer can be read and agrees with the gold
    answer, and its reasoning is not empty, not that of one already kept for the question, does not
    speak of the hint, begin with the answer or quote the student. Any other is a row too, with the
    verdict that says why: nothing is repaired or dropped.

    An answer that was cut, or seems so because it ends without an answer, is asked for once more
    with twice the tokens, and the new one takes its place.

    Args:
      questions: Q questions to ask about, all of the train split, in any order.
      mistakes: The student's wrong completion for those questions that have one, by id; empty in
        the first round.
      complete: Maps P asks to P times as many completions as each has slots, in order. Holds the
        model, retries, the ledger and the budget, so this function has none of those knobs. Its
        asks are made when they are looked at; where the completions are, too, no more than one
        question's are held.
      prompt: Makes the prompt from a question and its mistake; None asks without one.
      round_index: Copied into every row, and decides which slots of a prompt are asked: one that
        an earlier round asked already is asked for new samples.
      samples: S, completions per question.
      extra_tries: How often a question of which nothing was kept is asked for S more.
      alternatives: How many likely tokens the teacher is to name for each one it says; what it
        says of them is in the `pieces` of the rows that are kept.

    Yields:
      S rows for each time a question was asked, ordered by question as given and then by sample.

    Raises:
      ValueError: a question is not of the train split or occurs twice, or a mistake's question is
        not among them. Checked before the first request: nothing has been spent.
      TeacherError: raised by `complete`. Answers already paid for are in its ledger, so the same
        call can be repeated.

    Source:
      Wang et al., "Democratizing Reasoning Ability" (EMNLP 2023), section 3.2. Keeping only
      rationales that reach the gold answer is the filter of STaR (Zelikman et al., 2022).

    Example:
      >>> q = Question("gsm8k/train/7", "3 + 4?", "7", "train", "numeric")
      >>> says = ["3 + 4 = 7.\\nAnswer: 7", "It is 8.\\nAnswer: 8"]
      >>> complete = lambda asks: [[Completion(text, "stop", 9) for text in says]]
      >>> rows = ask_teacher([q], {}, complete, prompt=lambda question, mistake: question.text,
      ...                    round_index=1, samples=2)
      >>> [(row.text, row.verdict) for row in rows]
      [('3 + 4 = 7.', 'kept'), ('It is 8.', 'wrong')]
    """
    _check(questions, mistakes)
    first = (round_index - 1) * samples * (1 + extra_tries)
    tries: list[_Try] = []

    def mark(place: int) -> list[Rationale]:
        said = [completion for each in tries for completion in each.answers(place)]
        question = questions[place]
        return _mark_all(question, said, mistakes.get(question.id, ""), round_index)

    asked: Sequence[int] = range(len(questions))
    for extra in range(1 + extra_tries):
        start = first + extra * samples
        slots = tuple(range(start, start + samples))

        def ask(place: int, slots: tuple[int, ...] = slots) -> Ask:
            shown = prompt(questions[place], mistakes.get(questions[place].id))
            return Ask(shown, slots, alternatives=alternatives)

        tries.append(_Try.make(questions, asked, ask, complete))
        if extra < extra_tries:
            asked = array("q", (i for i in asked if all(row.verdict != "kept" for row in mark(i))))
    for place in range(len(questions)):
        yield from mark(place)


@dataclass(frozen=True)
class _Try:
    """What came back of one time of asking, those that were cut asked for once more.

    Attributes:
      places: The questions that were asked, ascending.
      first: The completions of each.
      again: Those of them that seemed cut, by place among the places.
      longer: The completions that take their place, in the same order.
    """

    places: Sequence[int]
    first: Sequence[Sequence[Completion]]
    again: Mapping[int, tuple[int, Sequence[int]]]
    longer: Sequence[Sequence[Completion]]

    @classmethod
    def make(
        cls,
        questions: Sequence[Question],
        places: Sequence[int],
        ask: Callable[[int], Ask],
        complete: Complete,
    ) -> "_Try":
        """Asks, and asks again with a larger limit."""
        first = complete(OnDemand(len(places), lambda index: ask(places[index])))
        again: dict[int, tuple[int, Sequence[int]]] = {}
        for index, (place, said) in enumerate(zip(places, first, strict=True)):
            cut = [i for i, text in enumerate(said) if _seems_cut(questions[place], text)]
            if cut:
                again[index] = (len(again), cut)
        order = [*again]

        def ask_longer(number: int) -> Ask:
            wanted = ask(places[order[number]])
            slots = tuple(wanted.slots[i] for i in again[order[number]][1])
            return replace(wanted, slots=slots, longer=True)

        longer = complete(OnDemand(len(order), ask_longer)) if order else ()
        return cls(places, first, again, longer)

    def answers(self, place: int) -> list[Completion]:
        """The completions of a question; none if it was not asked."""
        index = bisect_left(self.places, place)
        if index == len(self.places) or self.places[index] != place:
            return []
        found = list(self.first[index])
        number, cut = self.again.get(index, (0, ()))
        for i, completion in zip(cut, self.longer[number] if cut else (), strict=True):
            if completion.finish_reason != "error":
                found[i] = completion
        return found


def mark_attempts(
    questions: Sequence[Question], exams: Iterable[Iterable[Attempt]], *, round_index: int
) -> Iterator[Rationale]:
    """A lesson that the student gives itself: its own attempts, marked like a teacher's answers.

    Args:
      questions: In the order of the rows to come.
      exams: Attempts at these questions, in the same order; first come, first kept.
      round_index: Copied into every row.

    Source:
      Zelikman et al., "STaR: Bootstrapping Reasoning With Reasoning" (NeurIPS 2022).
    """
    places = {question.id: place for place, question in enumerate(questions)}

    def place(attempt: Attempt) -> int:
        return places[attempt.question_id]

    for index, attempts in groupby(heapq.merge(*exams, key=place), key=place):
        said = [Completion(a.text, "length" if a.cut else "stop", a.num_tokens) for a in attempts]
        yield from _mark_all(questions[index], said, "", round_index)


def _check(questions: Sequence[Question], mistakes: Mapping[str, str]) -> None:
    for question in questions:
        if question.split != "train":
            raise ValueError(
                f"the teacher is asked about train questions only; {question.id} is of the "
                f"{question.split} split."
            )
    times = Counter(question.id for question in questions)
    twice = [id for id, count in times.items() if count > 1]
    if twice:
        raise ValueError(f"each question is asked once; {twice[0]} was given {times[twice[0]]}x.")
    unknown = sorted(set(mistakes) - set(times))
    if unknown:
        raise ValueError(f"each mistake needs its question; {unknown[0]} is not among them.")


def _seems_cut(question: Question, completion: Completion) -> bool:
    """Whether the token limit ended an answer; some servers don't say so."""
    if completion.finish_reason != "stop":
        return completion.finish_reason == "length"
    return read_answer(completion.text, question.kind, paragraphs=True) is None


def _mark_all(
    question: Question, completions: Sequence[Completion], mistake: str, round_index: int
) -> list[Rationale]:
    rows: list[Rationale] = []
    kept: set[str] = set()
    for index, completion in enumerate(completions):
        text = clean_rationale(completion.text)
        verdict, answer = _mark(question, completion, text)
        if verdict == "kept":
            if _essence(text) in kept:
                verdict = "duplicate"
            elif leaks(text, question, mistake):
                verdict = "leak"
            else:
                kept.add(_essence(text))
        pieces = completion.pieces if verdict == "kept" else ()
        rows.append(Rationale(question.id, round_index, index, text, answer, verdict, pieces))
    return rows


def _mark(question: Question, completion: Completion, text: str) -> tuple[Verdict, str | None]:
    """The verdict on one answer by itself, and the answer as read; None where it was cut."""
    if completion.finish_reason == "length":
        return "cut", None
    if completion.finish_reason != "stop":
        return "failed", None
    answer = read_answer(completion.text, question.kind, paragraphs=True)
    if answer is None:
        return "unreadable", None
    if not same_answer(answer, question.answer, question.kind):
        return "wrong", answer
    # an answer, but no reasoning that could be trained on
    return ("kept" if text else "unreadable"), answer


def leaks(text: str, question: Question, mistake: str) -> bool:
    """Whether a right rationale gives away that its writer knew the answer or saw the mistake.

    It speaks of the hint, begins with the answer, or quotes the mistake in full. A rationale that
    begins with the student's words and goes on is none of these: they were right as far as they
    went.

    Args:
      text: The rationale, as `clean_rationale` returns it.
      question: Where the hint may also be part of the question: then it is free to speak of it.
      mistake: The student's completion, or `""`.

    Example:
      >>> tom = Question("t/1", "Tom has 2 eggs. He finds 3. How many?", "5", "train", "numeric")
      >>> leaks("As the hint says, it is 5.", tom, ""), leaks("2 + 3 = 5.", tom, "")
      (True, False)
    """
    asked = _essence(question.text)
    if any(_essence(told[0]) not in asked for told in _TOLD.finditer(text)):
        return True
    answer = f"({question.answer})" if question.kind == "choice" else question.answer
    if _ANSWER_FIRST.match(text) or re.match(
        rf"\W*{re.escape(answer)}\s*(?:[.,:;!]|$)", text, re.I
    ):
        return True
    words = _essence(clean_rationale(mistake))
    return len(words.split()) >= _LONG_ENOUGH and words in _essence(text)[1:]


def _essence(text: str) -> str:
    """The words of a text: two rationales that differ in nothing else teach the same."""
    return " ".join(re.sub(r"[^\w\s+*/=<>%.-]|[.](?!\d)", " ", text.casefold()).split())
