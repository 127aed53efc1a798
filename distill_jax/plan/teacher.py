"""What a run may cost, before anything is spent: requests, tokens and dollars."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from distill_jax.config import TEACHER, Config, is_free
from distill_jax.prompts import judge_prompt
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.records import Question
from distill_jax.teaching import asks_teacher, exam_prompt, make_prompt

_EXPECTED_SHARE = 0.5  # of the questions, in every round after the first
_EXPECTED_ANSWER = 0.5  # of the token limit
_BYTES_PER_TOKEN = {"low": 5.0, "expected": 4.0, "upper": 1.0}
_EXPECTED_RIGHT = 0.5  # of the teacher's answers and the student's: those that are to be judged
_VERDICT = 4  # tokens of a yes or no
_OVERHEAD = 64  # tokens that a chat template may add, at the upper bound
_BYTES_PER_STUDENT_TOKEN = 8  # of a mistake that is shown; high for English


@dataclass(frozen=True, slots=True)
class Bounds:
    """One quantity, from the least that a whole run needs to the most that it can."""

    low: float | int
    expected: float | int
    upper: float | int


Work = tuple[float, float, float]
"""Requests, and tokens of prompts and of answers."""


@dataclass(frozen=True, slots=True)
class TeacherPlan:
    """What the teacher's part of a run takes.

    Attributes:
      num_questions: Training questions: those that may be asked about.
      num_rounds: At most.
      free: Whether the endpoint costs nothing.
      requests: HTTP requests that bring an answer.
      prompt_tokens, answer_tokens: Sent and received.
      minutes: That `teacher.per_minute` makes it last; 0 where nothing is limited.
      usd: US dollars that it would take; the run pauses before it spends more than the budget.
      budget_usd: The limit; 0 where nothing costs.
    """

    num_questions: int
    num_rounds: int
    free: bool
    requests: Bounds
    prompt_tokens: Bounds
    answer_tokens: Bounds
    minutes: Bounds
    usd: Bounds
    budget_usd: float


def plan_teacher(config: Config) -> TeacherPlan:
    """Counts what a run would ask of its teacher; asks nothing and writes nothing.

    Low: every question is answered right after round 1, and the teacher is brief; if it judges, it
    judges one rationale a question. Expected: each later round asks about half of the questions,
    answers take half of the tokens they may, and half of those it gives and of the student's own
    are right, and judged. Upper: every round asks about all of them, every sample takes a request
    of its own, is cut and asked for again with twice the tokens, every extra try is needed, all are
    judged, and a token is a byte.

    Raises:
      ConfigError: the questions can't be read.
    """
    questions = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    train = [question for question in questions if question.split == "train"]
    if config.student.model == TEACHER or not asks_teacher(config):
        asked = [q for q in questions if q.split != "train" and config.student.model == TEACHER]
        parts = [_exams(config, asked)]
    else:
        parts = [_lessons(config, train), _judgements(config, train)]
    sums = {
        name: [sum(values) for values in zip(*(part[name] for part in parts), strict=True)]
        for name in _BYTES_PER_TOKEN
    }
    price, limits = config.teacher.price_usd or (0.0, 0.0), config.teacher.per_minute

    def minutes(requests: float, sent: float, said: float) -> float:
        used = zip((requests, sent + said), limits, strict=True)
        return max(amount / limit if limit else 0.0 for amount, limit in used)

    usd = {
        name: (sent * price[0] + said * price[1]) / 1e6 for name, (_, sent, said) in sums.items()
    }
    requests, prompt_tokens, answer_tokens = (
        Bounds(*values) for values in zip(*sums.values(), strict=True)
    )
    return TeacherPlan(
        num_questions=len(train),
        num_rounds=config.rounds.max,
        free=not any(price),
        requests=requests,
        prompt_tokens=prompt_tokens,
        answer_tokens=answer_tokens,
        minutes=Bounds(*(minutes(*values) for values in sums.values())),
        usd=Bounds(**usd),
        budget_usd=config.teacher.budget_usd if any(price) else 0.0,
    )


def _lessons(config: Config, train: Sequence[Question]) -> dict[str, Work]:
    """What the teacher's explanations take."""
    teacher, later = config.teacher, max(config.rounds.max - 1, 0)
    first, again = _prompt_bytes(config, train)
    tries = 1 + teacher.extra_tries
    # the share of the questions in all later rounds, requests for a question, length of an answer
    cases = {
        "low": (0.0, 1, 0.25),
        "expected": (later * _EXPECTED_SHARE, 1, _EXPECTED_ANSWER),
        "upper": (float(later), 2 * teacher.samples * tries, 3.0 * tries),
    }
    found = {}
    for name, (share, times, length) in cases.items():
        requests = len(train) * (1 + share) * times
        sent = (first + share * again) * times
        said = len(train) * (1 + share) * teacher.samples * teacher.max_tokens * length
        found[name] = (requests, _tokens(name, sent, requests), said)
    return found


def _judgements(config: Config, train: Sequence[Question]) -> dict[str, Work]:
    """What it takes to judge what a round may be trained on, a request for each rationale."""
    teacher, rounds = config.teacher, config.rounds.max
    sources = config.train.rows if "judged" in config.train.rows else ()
    new, own = "new" in sources, "own" in sources
    given = teacher.samples * (1 + teacher.extra_tries)
    written = 1 + config.exam.samples
    half = 1 + (rounds - 1) * _EXPECTED_SHARE
    each = {  # rationales of a question, over all rounds
        "low": float(new),
        "expected": _EXPECTED_RIGHT * (new * half * teacher.samples + own * rounds * written),
        "upper": float(rounds * (new * given + own * written)),
    }
    size = sum(len(judge_prompt(question, "").encode()) for question in train) / len(train)
    longest = own * max(config.exam.max_new_tokens) * _BYTES_PER_STUDENT_TOKEN
    lengths = {  # bytes of a rationale
        "low": 0.25 * teacher.max_tokens * _BYTES_PER_TOKEN["low"],
        "expected": _EXPECTED_ANSWER * teacher.max_tokens * _BYTES_PER_TOKEN["expected"],
        "upper": max(2.0 * teacher.max_tokens, longest),
    }
    found = {}
    for name, read in lengths.items():
        requests = len(train) * each[name]
        said = teacher.max_tokens if name == "upper" else _VERDICT
        found[name] = (requests, _tokens(name, requests * (size + read), requests), requests * said)
    return found


def _exams(config: Config, asked: Sequence[Question]) -> dict[str, Work]:
    """What a teacher takes that sits the exams."""
    size = float(sum(len(exam_prompt(config, question).encode()) for question in asked))
    limit = config.exam.max_new_tokens[0]
    return {
        name: (
            float(len(asked)),
            _tokens(name, size, float(len(asked))),
            len(asked) * limit * share,
        )
        for name, share in (("low", 0.25), ("expected", _EXPECTED_ANSWER), ("upper", 1.0))
    }


def _tokens(name: str, num_bytes: float, requests: float) -> float:
    """Of prompts."""
    return num_bytes / _BYTES_PER_TOKEN[name] + (requests * _OVERHEAD if name == "upper" else 0.0)


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
    if plan.minutes.upper:
        rows["minutes"] = plan.minutes
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
