"""What a run came to, in sentences that claim no more than was measured."""

from distill_jax.config import TEACHER, is_free
from distill_jax.progress import one_line
from distill_jax.report.marks import Change, Marks
from distill_jax.report.summary import Summary

CAUTION = (
    "Rounds and training steps rise together, so a rising curve alone does not show that rounds "
    "help: one round with as many steps, and as many answers asked of the teacher, is the "
    "comparison that would."
)
NOT_KNOWN = "-"


def percent(share: float | None) -> str:
    """A share as a percentage with one decimal.

    Example:
      >>> percent(0.0525), percent(None)
      ('5.2%', '-')
    """
    return NOT_KNOWN if share is None else f"{100 * share:.1f}%"


def interval(marks: Marks) -> str:
    """The 95% interval of an accuracy, in percent."""
    low, high = marks.interval
    return f"{100 * low:.1f} to {100 * high:.1f}"


def headline(summary: Summary) -> str:
    """The result so far: from which accuracy to which, over how many questions."""
    exams = list(summary.test.items())
    if len(exams) > 1:
        (_, first), (last_round, last) = exams[0], exams[-1]
        return (
            f"On {first.marks.num_questions:,} test questions, accuracy was "
            f"{_with_interval(first.marks)} before training and {_with_interval(last.marks)} "
            f"after round {last_round}{_change(summary.test_change)}."
        )
    if exams:
        marks = exams[0][1].marks
        who = "teacher" if summary.config.student.model == TEACHER else "untrained student"
        trained = any(entry.dev for entry in summary.rounds if entry.round_index)
        why = ": no round did better on dev" if trained else ""
        return (
            f"The {who} is the result, with {_with_interval(marks)} on {marks.num_questions:,} "
            f"test questions{why}."
        )
    return _headline_without_test(summary)


def _headline_without_test(summary: Summary) -> str:
    best, first = summary.best_dev, next((r.dev for r in summary.rounds if r.dev), None)
    if not best or not best.dev or not first:
        return "No exam on held-out questions has been finished yet."
    if best.round_index == 0:
        return (
            f"No test exam has been finished. On {first.marks.num_questions:,} dev questions the "
            f"untrained student's accuracy is {_with_interval(first.marks)}; no round has done "
            "better so far."
        )
    return (
        f"No test exam has been finished. On {first.marks.num_questions:,} dev questions, accuracy "
        f"was {_with_interval(first.marks)} before training and {_with_interval(best.dev.marks)} "
        f"after round {best.round_index}, the best so far; dev also chooses the round, so this "
        "flatters."
    )


def _with_interval(marks: Marks) -> str:
    return f"{percent(marks.accuracy)} (95% interval {interval(marks)})"


def _change(change: Change | None) -> str:
    if change is None:
        return ""
    p = change.p_value
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return (
        f"; {change.num_gained:,} answers turned right and {change.num_lost:,} turned wrong "
        f"(McNemar's exact test: {shown})"
    )


def standing(summary: Summary) -> str:
    """Where the run is, in words."""
    phase = summary.phase
    if phase.name == "done":
        chosen = f"; round {summary.chosen_round} is the result"
        return f"done{chosen}. Why it stopped: {one_line(summary.stop_reason or NOT_KNOWN)}"
    where = "" if phase.name == "test exam" else f", round {phase.round_index}"
    unit = "steps" if phase.name in ("training", "pretraining") else "questions"
    done = (
        f"{phase.num_done:,} of {phase.num_total:,}" if phase.num_total else f"{phase.num_done:,}"
    )
    return f"{phase.name}{where}: {done} {unit} done"


def spending(summary: Summary) -> str:
    """What the teacher was asked and what it cost, in words."""
    teacher, ledger = summary.config.teacher, summary.ledger
    if ledger is None:
        return "the teacher has not been asked yet"
    counts = (
        f"{ledger.num_requests:,} requests to the teacher: {ledger.num_answers:,} answered, "
        f"{ledger.num_failures:,} failed, {ledger.num_open:,} with an unknown end"
    )
    if is_free(teacher.url) or not teacher.budget_usd:
        return f"{counts}; spent {dollars(ledger.spent_usd)}"
    left = max(0.0, teacher.budget_usd - ledger.spent_usd)
    unsure = f", {dollars(ledger.open_usd)} of it uncertain" if ledger.open_usd else ""
    return (
        f"{counts}; spent {dollars(ledger.spent_usd)}{unsure}, {dollars(left)} left of "
        f"{dollars(teacher.budget_usd)}"
    )


def dollars(usd: float) -> str:
    """US dollars, exact to a hundredth of a cent.

    Example:
      >>> dollars(0.0), dollars(0.01234), dollars(1234.5)
      ('$0.00', '$0.0123', '$1,234.50')
    """
    return f"${usd:,.2f}" if usd >= 1 or round(usd, 4) == 0 else f"${usd:.4f}"
