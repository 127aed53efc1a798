"""One round's lesson: whom to ask about what, and where the teacher is; the teacher's own exam."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from distill_jax import prompts
from distill_jax.answers import read_answer
from distill_jax.config import SELF, TEACHER, TUTOR, Config, is_free
from distill_jax.exam import Sitting
from distill_jax.on_demand import OnDemand
from distill_jax.progress import Progress
from distill_jax.records import GREEDY, Attempt, Completion, Form, Lesson, Question, Rationale
from distill_jax.soft_targets import ALTERNATIVES
from distill_jax.teacher.account import Ask, find_secret
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.lesson import Complete, Prompt, ask_teacher
from distill_jax.teacher.tutor import serve


def is_mistake(attempt: Attempt) -> bool:
    """Whether it is a greedy answer that is wrong."""
    return attempt.sample_index == GREEDY and not attempt.correct


def find_mistakes(attempts: Iterable[Attempt]) -> dict[str, str]:
    """The text of each mistake, by question."""
    return {attempt.question_id: attempt.text for attempt in filter(is_mistake, attempts)}


def wants_rationales(config: Config) -> bool:
    """Whether any form of the targets has a rationale; bare answers need no teacher."""
    return any(form.startswith("rationale") for form in config.train.targets)


def wanted_alternatives(config: Config) -> int:
    """How many likely tokens the teacher is to name for each one it says, to be learnt, too."""
    return ALTERNATIVES if "soft" in config.train.rows else 0


def asks_teacher(config: Config) -> bool:
    """Whether anything goes out to a teacher in the whole run."""
    taught = config.rounds.max and config.teacher.url != SELF and wants_rationales(config)
    return config.student.model == TEACHER or bool(taught)


def exam_prompt(
    config: Config, question: Question, *, form: Form | None = None, hint: bool = False
) -> str:
    """What the student is shown, with the worked examples that the config asks for.

    Args:
      config: Task and forms.
      question: The question.
      form: What is asked for; None: what the config's exams ask for.
      hint: Whether the gold answer is shown, for a student that explains it to itself.
    """
    task, form = config.task, form or config.train.targets[0]
    shown = "student" in task.demonstrations
    examples = prompts.demonstrations(task.name, form, hint=hint) if shown else ""
    return prompts.exam_prompt(question, demonstrations=examples, form=form, hint=hint)


def sit_exam(config: Config, folder: Path, questions: Sequence[Question]) -> Sitting:
    """The teacher as one who sits exams, for `take_exam`: greedy answers alone, no hint.

    An answer that never came is an empty text, and marked wrong like any other silence.
    """
    limit = config.exam.max_new_tokens[0]
    greedy = config.teacher.model_copy(
        update={"temperature": 0.0, "samples": 1, "max_tokens": limit}
    )

    def generate(
        prompts: Iterable[str], ids: Sequence[str], *, done: Collection[int] = ()
    ) -> Iterator[tuple[int, list[Completion]]]:
        owed = {index: text for index, text in enumerate(prompts) if index not in done}
        with (
            Ledger(folder / "ledger.sqlite") as ledger,
            _teacher(config.model_copy(update={"teacher": greedy}), ledger, questions) as teacher,
        ):
            answers = teacher.fetch([Ask(text, (0,)) for text in owed.values()])
            for index, (said,) in zip(owed, answers, strict=True):
                text = "\n".join(line for line in said.text.splitlines() if line.strip())
                yield index, [replace(said, text=text)]

    return generate


def check_teacher(config: Config) -> None:
    """Makes sure that a teacher who will be asked can be asked, without asking.

    Raises:
      CredentialsRefused: there is no key and one is needed, or it can't be read.
    """
    if asks_teacher(config):
        find_secret(config.teacher, free=is_free(config.teacher.url))


def teach(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    attempts: Iterable[Attempt],
    *,
    round_index: int,
    progress: Progress,
) -> Iterator[Rationale]:
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
    mistakes = find_mistakes(attempts) if round_index > 1 else {}
    asked = _asked(questions, mistakes, round_index)
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

        fetch = partial(teacher.fetch, advance=tick)
        yield from _lesson(config, asked, mistakes, fetch, round_index)


def judge(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    rationales: Sequence[Rationale],
    *,
    round_index: int,
    progress: Progress,
) -> Iterator[Rationale]:
    """Those of the rationales that the teacher approves of; what its ledger holds costs nothing.

    One without a readable yes is not approved.

    Args:
      config: The run's settings.
      folder: The run, with its ledger.
      questions: All training questions.
      rationales: With right answers; the teacher's own, or the student's.
      round_index: From 1.
      progress: Where to show it.

    Raises:
      TeacherError, OSError: as `TeacherClient.complete`.
    """
    asked = {question.id: question for question in questions}

    def ask(index: int) -> Ask:
        row = rationales[index]
        return Ask(prompts.judge_prompt(asked[row.question_id], row.text), (0,))

    asks = OnDemand(len(rationales), ask)
    with (
        progress.stage(
            f"judging, round {round_index}", total=len(asks), unit="rationales"
        ) as advance,
        Ledger(folder / "ledger.sqlite") as ledger,
        _teacher(config, ledger, questions) as teacher,
    ):
        answers = teacher.fetch(asks, advance=advance)
        for row, (answer,) in zip(rationales, answers, strict=True):
            if read_answer(answer.text, "yes_no", paragraphs=True) == "Yes":
                yield row


def replay(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    attempts: Iterable[Attempt],
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
        mistakes = find_mistakes(attempts)
        asked = _asked(questions, mistakes, round_index)
        return Lesson(tuple(_lesson(config, asked, mistakes, teacher.recall, round_index)))


def _asked(
    questions: Sequence[Question], mistakes: Mapping[str, str], round_index: int
) -> list[Question]:
    """Every question in round 1; later those that the greedy answer got wrong."""
    return [question for question in questions if round_index == 1 or question.id in mistakes]


def _lesson(
    config: Config,
    asked: Sequence[Question],
    mistakes: Mapping[str, str],
    complete: Complete,
    round_index: int,
) -> Iterator[Rationale]:
    """Round 1 asks without feedback; later rounds show the mistake unless feedback is off."""
    feedback = config.teacher.feedback and round_index > 1
    return ask_teacher(
        asked,
        mistakes if feedback else {},
        complete,
        prompt=make_prompt(config),
        round_index=round_index,
        samples=config.teacher.samples,
        extra_tries=config.teacher.extra_tries,
        alternatives=wanted_alternatives(config),
    )


def make_prompt(config: Config) -> Prompt:
    """What the teacher is shown of a question and the mistake, if there is one."""
    name, hint = config.task.name, config.teacher.hint
    examples = ["", ""]
    if "teacher" in config.task.demonstrations:
        examples = [
            prompts.teacher_demonstrations(name, feedback=shown, hint=hint)
            for shown in (False, True)
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
