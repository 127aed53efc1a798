"""What a run may cost, before anything is spent: requests, tokens and dollars."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, replace
from typing import Any

from distill_jax.config import TEACHER, Config, is_free
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.records import Question
from distill_jax.teaching import asks_teacher, exam_prompt, make_prompt

_EXPECTED_SHARE = 0.5  # of the questions, in every round after the first
_EXPECTED_ANSWER = 0.5  # of the token limit
_BYTES_PER_TOKEN = {"low": 5.0, "expected": 4.0, "upper": 1.0}
_OVERHEAD = 64  # tokens that a chat template may add, at the upper bound
_BYTES_PER_STUDENT_TOKEN = 8  # of a mistake that is shown; high for English


@dataclass(frozen=True, slots=True)
class Bounds:
    """One quantity, from the least that a whole run needs to the most that it can."""

    low: float | int
    expected: float | int
    upper: float | int


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """What the teacher's part of a run takes.

    Attributes:
      num_questions: Training questions: those that may be asked about.
      num_rounds: At most.
      free: Whether the endpoint costs nothing.
      requests: HTTP requests that bring an answer.
      prompt_tokens, answer_tokens: Sent and received.
      usd: US dollars that it would take; the run pauses before it spends more than the budget.
      budget_usd: The limit; 0 where nothing costs.
    """

    num_questions: int
    num_rounds: int
    free: bool
    requests: Bounds
    prompt_tokens: Bounds
    answer_tokens: Bounds
    usd: Bounds
    budget_usd: float


def plan_teacher(config: Config) -> TeacherPlan:
    """Counts what a run would ask of its teacher; asks nothing and writes nothing.

    Low: every question is answered right after round 1, and the teacher is brief. Expected: each
    later round asks about half of the questions, and answers take half of the tokens they may.
    Upper: every round asks about all of them, every sample takes a request of its own, is cut and
    asked for again with twice the tokens, every extra try is needed, and a token is a byte.

    Raises:
      ConfigError: the questions can't be read.
    """
    questions = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    train = [question for question in questions if question.split == "train"]
    if config.student.model == TEACHER or not asks_teacher(config):
        return _plan_exams(config, questions)
    teacher, later = config.teacher, max(config.rounds.max - 1, 0)
    first, again = _prompt_bytes(config, train)
    asked = {"low": 0.0, "expected": later * _EXPECTED_SHARE, "upper": float(later)}
    most = 2 * teacher.samples * (1 + teacher.extra_tries)  # requests for a question, one by one
    requests, prompt_tokens, answer_tokens = {}, {}, {}
    for name, share in asked.items():
        times = most if name == "upper" else 1
        rounds = 1 + share
        requests[name] = len(train) * rounds * times
        sent = (first + share * again) / _BYTES_PER_TOKEN[name] * times
        prompt_tokens[name] = sent + (requests[name] * _OVERHEAD if name == "upper" else 0.0)
        length = {
            "low": 0.25,
            "expected": _EXPECTED_ANSWER,
            "upper": 3.0 * (1 + teacher.extra_tries),
        }
        answer_tokens[name] = (
            len(train) * rounds * teacher.samples * teacher.max_tokens * length[name]
        )
    price = teacher.price_usd or (0.0, 0.0)
    usd = {
        name: (prompt_tokens[name] * price[0] + answer_tokens[name] * price[1]) / 1e6
        for name in asked
    }
    free = not any(price)
    return TeacherPlan(
        num_questions=len(train),
        num_rounds=config.rounds.max,
        free=free,
        requests=Bounds(**requests),
        prompt_tokens=Bounds(**prompt_tokens),
        answer_tokens=Bounds(**answer_tokens),
        usd=Bounds(**usd),
        budget_usd=0.0 if free else teacher.budget_usd,
    )


def _plan_exams(config: Config, questions: Sequence[Question]) -> TeacherPlan:
    """What a run takes whose teacher teaches nobody: it sits the exams, or is not asked at all."""
    train = [question for question in questions if question.split == "train"]
    asked = [q for q in questions if q.split != "train" and config.student.model == TEACHER]
    size = sum(len(exam_prompt(config, question).encode()) for question in asked)
    limit = config.exam.max_new_tokens[0]
    prompt_tokens = Bounds(*(size / share for share in _BYTES_PER_TOKEN.values()))
    prompt_tokens = replace(prompt_tokens, upper=prompt_tokens.upper + len(asked) * _OVERHEAD)
    answer_tokens = Bounds(*(len(asked) * limit * share for share in (0.25, _EXPECTED_ANSWER, 1.0)))
    price = config.teacher.price_usd or (0.0, 0.0)
    bounds = zip(astuple(prompt_tokens), astuple(answer_tokens), strict=True)
    usd = Bounds(*((sent * price[0] + said * price[1]) / 1e6 for sent, said in bounds))
    return TeacherPlan(
        num_questions=len(train),
        num_rounds=config.rounds.max,
        free=not any(price),
        requests=Bounds(*[float(len(asked))] * 3),
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        usd=usd,
        budget_usd=config.teacher.budget_usd if any(price) else 0.0,
    )


def _prompt_bytes(config: Config, questions: Sequence[Question]) -> tuple[int, int]:
    """Bytes of all prompts of the first round, and of a later one that asks about everything."""
    prompt = make_prompt(config)
    words = "x" * (config.exam.max_new_tokens[0] * _BYTES_PER_STUDENT_TOKEN)
    mistake = words if config.teacher.feedback else None
    return (
        sum(len(prompt(question, None).encode()) for question in questions),
        sum(len(prompt(question, mistake).encode()) for question in questions),
    )


def plan_json(plan: TeacherPlan) -> dict[str, Any]:
    """The plan as numbers and short texts; counts are whole."""
    counts = {
        name: Bounds(*(round(value) for value in asdict(getattr(plan, name)).values()))
        for name in ("requests", "prompt_tokens", "answer_tokens")
    }
    return {"teacher": asdict(replace(plan, **counts))}


def plan_lines(config: Config, plan: TeacherPlan) -> list[str]:
    """The plan for a reader."""
    where = "on this machine" if is_free(config.teacher.url) else config.teacher.url
    lines = [
        f"questions to teach: {plan.num_questions:,}, in up to {plan.num_rounds} rounds",
        f"teacher: {config.teacher.model}, {where}",
    ]
    rows = {
        "requests": plan.requests,
        "prompt tokens": plan.prompt_tokens,
        "answer tokens": plan.answer_tokens,
    }
    lines.append(f"{'':14}{'low':>14}{'expected':>14}{'upper':>14}")
    for name, bounds in rows.items():
        values = (bounds.low, bounds.expected, bounds.upper)
        lines.append(f"{name:14}" + "".join(f"{value:>14,.0f}" for value in values))
    if plan.free:
        return [*lines, "US dollars: nothing, the teacher is free"]
    values = (plan.usd.low, plan.usd.expected, plan.usd.upper)
    lines.append(f"{'US dollars':14}" + "".join(f"{value:>14,.2f}" for value in values))
    enough = "" if plan.usd.expected <= plan.budget_usd else "; the run will probably pause there"
    return [*lines, f"never spent: more than teacher.budget_usd, {plan.budget_usd:,.2f}{enough}"]
