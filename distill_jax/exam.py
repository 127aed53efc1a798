"""The exam: questions and a student make marked attempts."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence

from distill_jax.answers import read_answer, same_answer
from distill_jax.records import GREEDY, Attempt, Completion, Kind, Question

Sitting = Callable[..., Iterable[tuple[int, Sequence[Completion]]]]
"""`generate.Generate` with student, samples, seed and round bound; a test may pass its own.

Called with prompts, gone through once, their ids, and `done`, the indices of prompts to leave out.
"""


def take_exam(
    questions: Sequence[Question],
    generate: Sitting,
    *,
    prompt: Callable[[Question], str],
    round_index: int,
    done: Collection[str] = (),
) -> Iterator[list[Attempt]]:
    """Asks the student every question and marks what comes back.

    An evaluation is this same call on held-out questions without samples, so a mistake counted
    here and a point lost there always mean the same thing.

    Args:
      questions: Q questions, in any order; ids must be distinct. Give all of them even where some
        are done: they decide who shares a batch.
      generate: Maps prompts and their ids to completions, the greedy one first, leaving out the
        indices in `done`. Holds the student, so the exam itself needs no accelerator.
      prompt: Words a question for the student.
      round_index: Of the weights that answer; copied into every attempt.
      done: Ids of questions that have been answered before and are left out.

    Yields:
      The attempts at one question, ordered by sample, as they come: questions in no particular
      order, each one that is not done exactly once. An attempt whose answer can't be read has
      `answer=None` and is marked wrong: silence is a mistake, never a dropped row. A text that the
      token limit cut is marked by what can be read in it, and counted as `cut` whatever the mark.

    Raises:
      ValueError: two questions share an id, `done` names a question that is not asked, or
        `generate` left out a question or answered it twice. The last is raised at the end.

    Source:
      Wang et al., "Democratizing Reasoning Ability" (EMNLP 2023): the student's exam.

    Example:
      >>> question = Question("t/1", "3 + 4?", answer="7", split="dev", kind="numeric")
      >>> def says(prompts, ids, *, done):
      ...     yield 0, [Completion("Answer: 7", "stop", 4), Completion("Answer: 8", "stop", 4)]
      >>> exam = take_exam([question], says, prompt=lambda q: q.text, round_index=0)
      >>> [[attempt.correct for attempt in attempts] for attempts in exam]
      [[True, False]]
    """
    ids = [question.id for question in questions]
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise ValueError(f"question ids must be distinct; {twice[0]!r} is there twice.")
    unknown = set(done) - set(ids)
    if unknown:
        raise ValueError(f"done names {min(unknown)!r}, which is not among the questions asked.")
    return _sit(questions, ids, generate, prompt, round_index, set(done))


def _sit(
    questions: Sequence[Question],
    ids: Sequence[str],
    generate: Sitting,
    prompt: Callable[[Question], str],
    round_index: int,
    done: set[str],
) -> Iterator[list[Attempt]]:
    owed = {index for index, name in enumerate(ids) if name not in done}
    skip = set(range(len(ids))) - owed
    for index, completions in generate(map(prompt, questions), ids, done=skip):
        if index not in owed:
            raise ValueError(f"generate answered {ids[index]!r}, which it does not owe.")
        owed.remove(index)
        yield [
            mark(questions[index], completion, sample_index=place, round_index=round_index)
            for place, completion in enumerate(completions)
        ]
    if owed:
        raise ValueError(f"generate left out {len(owed)} questions, such as {ids[min(owed)]!r}.")


def mark(
    question: Question, completion: Completion, *, sample_index: int, round_index: int
) -> Attempt:
    """Reads the answer in a completion and compares it with the gold answer."""
    answer = read_answer(completion.text, question.kind)
    return Attempt(
        question_id=question.id,
        round_index=round_index,
        sample_index=sample_index,
        text=completion.text,
        answer=answer,
        correct=answer is not None and same_answer(answer, question.answer, question.kind),
        cut=completion.finish_reason == "length",
        num_tokens=completion.num_tokens,
    )


def accuracy(attempts: Iterable[Attempt]) -> float:
    """The share of questions whose greedy answer is right; samples don't count.

    Raises:
      ValueError: there is no greedy attempt.

    Example:
      >>> right = Attempt("t/1", 0, GREEDY, "7", "7", correct=True, cut=False, num_tokens=2)
      >>> wrong = Attempt("t/2", 0, GREEDY, "8", "8", correct=False, cut=False, num_tokens=2)
      >>> drawn = Attempt("t/2", 0, 1, "9", "9", correct=True, cut=False, num_tokens=2)
      >>> accuracy([right, wrong, drawn])
      0.5
    """
    marks = [attempt.correct for attempt in attempts if attempt.sample_index == GREEDY]
    if not marks:
        raise ValueError("accuracy needs at least one greedy attempt; got none.")
    return sum(marks) / len(marks)


def vote(attempts: Sequence[Attempt], kind: Kind) -> Attempt:
    """The first of those samples whose answer most samples agree on: self-consistency.

    Samples without a readable answer don't vote, and the greedy answer neither. Of two answers with
    as many votes the one given first wins. Where nobody votes, the first sample, which can't be
    read; where there are no samples, the greedy answer.

    Args:
      attempts: At one question, at least one, ordered by sample.
      kind: Of the question.

    Source:
      Wang et al., "Self-Consistency Improves Chain of Thought Reasoning" (ICLR 2023).

    Example:
      >>> said = (("8", False), ("7", True), ("7.0", True), (None, False))
      >>> samples = [
      ...     Attempt("t/1", 0, place, "", answer, correct=right, cut=False, num_tokens=2)
      ...     for place, (answer, right) in enumerate(said, 1)
      ... ]
      >>> vote(samples, "numeric").answer, vote(samples[::3], "numeric").answer
      ('7', '8')
    """
    samples = [attempt for attempt in attempts if attempt.sample_index != GREEDY]
    camps: list[list[Attempt]] = []
    for attempt in samples:
        if attempt.answer is None:
            continue
        for camp in camps:
            if same_answer(attempt.answer, camp[0].answer or "", kind):
                camp.append(attempt)
                break
        else:
            camps.append([attempt])
    return max(camps, key=len)[0] if camps else [*samples, *attempts][0]


def passes(attempts: Iterable[Attempt]) -> bool:
    """Whether any sample of one question is right: pass@k with its k samples."""
    return any(attempt.correct for attempt in attempts if attempt.sample_index != GREEDY)
