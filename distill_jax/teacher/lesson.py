"""Mistakes and a teacher in, rationales to train on and counts of the rest out."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from distill_jax.answers import read_answer, same_answer
from distill_jax.prompts import clean_rationale
from distill_jax.records import Completion, Lesson, Question, Rationale, Verdict

Complete = Callable[[Sequence[str]], Sequence[Sequence[Completion]]]
Prompt = Callable[[Question, str | None], str]


def ask_teacher(
    questions: Sequence[Question],
    mistakes: Mapping[str, str],
    complete: Complete,
    *,
    prompt: Prompt,
    round_index: int,
    samples: int,
) -> Lesson:
    """Asks the teacher about each question once and marks every answer.

    An answer is kept when it came whole, its final answer can be read and agrees with the gold
    answer, and its reasoning is neither empty nor that of one already kept for the question. Any
    other is a row too, with the verdict that says why: nothing is repaired or dropped.

    Args:
      questions: Q questions to ask about, all of the train split, in any order.
      mistakes: The student's wrong completion for those questions that have one, by id; empty in
        the first round.
      complete: Maps P prompts to P times S completions, in order. Holds the model, retries, the
        ledger and the budget, so this function has none of those knobs.
      prompt: Makes the prompt from a question and its mistake; None asks without one.
      round_index: Copied into every row.
      samples: S, completions per question.

    Returns:
      Q * S rows, ordered by question as given and then by sample:
      `num_asked == len(kept) + sum(rejected.values()) == Q * S`, always.

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
      >>> complete = lambda prompts: [[Completion(text, "stop", 9) for text in says]]
      >>> lesson = ask_teacher([q], {}, complete, prompt=lambda question, mistake: question.text,
      ...                      round_index=1, samples=2)
      >>> [row.text for row in lesson.kept], lesson.rejected
      (['3 + 4 = 7.'], {'wrong': 1})
    """
    _check(questions, mistakes)
    prompts = [prompt(question, mistakes.get(question.id)) for question in questions]
    answers = complete(prompts)
    assert [len(row) for row in answers] == [samples] * len(questions), "S completions per prompt"
    rows: list[Rationale] = []
    for question, completions in zip(questions, answers, strict=True):
        kept: set[str] = set()
        for index, completion in enumerate(completions):
            text = clean_rationale(completion.text)
            verdict, answer = _mark(question, completion, text, kept)
            if verdict == "kept":
                kept.add(text)
            rows.append(Rationale(question.id, round_index, index, text, answer, verdict))
    return Lesson(tuple(rows))


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


def _mark(
    question: Question, completion: Completion, text: str, kept: set[str]
) -> tuple[Verdict, str | None]:
    """The verdict on one answer, and the answer as read; None where it did not come whole."""
    if completion.finish_reason == "length":
        return "cut", None
    if completion.finish_reason != "stop":
        return "failed", None
    answer = read_answer(completion.text, question.kind, paragraphs=True)
    if answer is None:
        return "unreadable", None
    if not same_answer(answer, question.answer, question.kind):
        return "wrong", answer
    if not text:
        return "unreadable", answer  # an answer, but no reasoning that could be trained on
    return ("duplicate" if text in kept else "kept"), answer
