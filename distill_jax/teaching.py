"""One round's lesson: whom to ask about what, and where the teacher is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from distill_jax import prompts
from distill_jax.config import TUTOR, Config, is_free
from distill_jax.progress import Progress
from distill_jax.records import GREEDY, Attempt, Lesson, Question
from distill_jax.teacher.account import find_secret
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import Complete, Prompt, ask_teacher
from distill_jax.teacher.tutor import serve


def find_mistakes(attempts: Sequence[Attempt]) -> dict[str, str]:
    """The greedy answers that are wrong, by question."""
    return {
        attempt.question_id: attempt.text
        for attempt in attempts
        if attempt.sample_index == GREEDY and not attempt.correct
    }


def check_teacher(config: Config) -> None:
    """Makes sure that the teacher can be asked later, without asking.

    Raises:
      CredentialsRefused: there is no key and one is needed, or it can't be read.
    """
    find_secret(config.teacher, free=is_free(config.teacher.url))


def teach(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    attempts: Sequence[Attempt],
    *,
    round_index: int,
    progress: Progress,
) -> Lesson:
    """The round's lesson from the teacher; what its ledger holds costs nothing.

    Args:
      config: The run's settings.
      folder: The run, with its ledger.
      questions: All training questions.
      attempts: The exam of the round.
      round_index: From 1.
      progress: Where to show it.

    Raises:
      TeacherError, OSError: as `TeacherClient.complete`.
    """
    asked = _asked(questions, attempts, round_index)
    with (
        progress.stage(
            f"teaching, round {round_index}", total=len(asked), unit="questions"
        ) as advance,
        Ledger(folder / "ledger.sqlite") as ledger,
        _teacher(config, ledger, questions) as teacher,
    ):
        left = len(asked)

        def tick(amount: int, detail: str) -> None:  # a question asked again was counted already
            nonlocal left
            counted = min(amount, left)
            left -= counted
            advance(counted, detail)

        complete = partial(teacher.complete, advance=tick)
        return _lesson(config, asked, attempts, complete, round_index)


def replay(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    attempts: Sequence[Attempt],
    *,
    round_index: int,
) -> Lesson:
    """The round's lesson as it is read today from what the ledger holds. Asks and costs nothing.

    With a better reader of answers than the one that read them first, more may be kept. Answers
    that the ledger doesn't hold have the verdict `failed`.
    """
    with Ledger(folder / "ledger.sqlite") as ledger:
        url = config.teacher.url
        teacher = TeacherClient(config.teacher, ledger, url=url, free=True)
        asked = _asked(questions, attempts, round_index)
        return _lesson(config, asked, attempts, teacher.recall, round_index)


def _asked(
    questions: Sequence[Question], attempts: Sequence[Attempt], round_index: int
) -> list[Question]:
    """Every question in round 1; later those that the greedy answer got wrong."""
    mistakes = find_mistakes(attempts)
    return [question for question in questions if round_index == 1 or question.id in mistakes]


def _lesson(
    config: Config,
    asked: Sequence[Question],
    attempts: Sequence[Attempt],
    complete: Complete,
    round_index: int,
) -> Lesson:
    """Round 1 asks without feedback; later rounds show the mistake unless feedback is off."""
    feedback = config.teacher.feedback and round_index > 1
    return ask_teacher(
        asked,
        find_mistakes(attempts) if feedback else {},
        complete,
        prompt=make_prompt(config),
        round_index=round_index,
        samples=config.teacher.samples,
        extra_tries=config.teacher.extra_tries,
    )


def make_prompt(config: Config) -> Prompt:
    """What the teacher is shown of a question and the mistake, if there is one."""
    name, hint = config.task.name, config.teacher.hint
    examples = [
        prompts.teacher_demonstrations(name, feedback=shown, hint=hint) for shown in (False, True)
    ]

    def prompt(question: Question, mistake: str | None) -> str:
        shown = examples[mistake is not None]
        return prompts.feedback_prompt(question, mistake=mistake, hint=hint, demonstrations=shown)

    return prompt


@contextmanager
def _teacher(
    config: Config, ledger: Ledger, questions: Sequence[Question]
) -> Iterator[TeacherClient]:
    """The teacher behind its ledger; the tutor is started if it is the teacher."""
    client = partial(TeacherClient, config.teacher, ledger, free=is_free(config.teacher.url))
    if config.teacher.url != TUTOR:
        yield client(url=config.teacher.url)
        return
    with serve(questions, tutor=config.tutor, seed=config.seed) as url:
        yield client(url=url)
