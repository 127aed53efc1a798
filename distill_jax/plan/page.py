"""All that is known of a run before it is paid for: for a reader, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distill_jax.config import Config
from distill_jax.layouts import num_weights
from distill_jax.plan.fit import Compiled, Fit, Student
from distill_jax.plan.teacher import TeacherPlan, plan_json, plan_lines
from distill_jax.plan.topology import Exchange, Program
from distill_jax.student.model import abstract_params

GB, TERA = 1e9, 1e12


def page_json(
    teacher: TeacherPlan, student: Student | None, fits: Sequence[Fit], compiled: Sequence[Compiled]
) -> dict[str, Any]:
    """The plan as numbers and short texts. Sizes are bytes of one device, times are seconds."""
    page = plan_json(teacher)
    if student is not None:
        texts = {"shared_tokens": student.texts.shared, "tokenized": student.texts.measured}
        page["student"] = {"weights": _num_weights(student), **texts, **asdict(student.round)}
    page["hardware"] = [
        {**asdict(each), "fits": each.fits, "layout": str(each.layout)} for each in fits
    ]
    page["topologies"] = [compiled_json(each) for each in compiled]
    return page


def _num_weights(student: Student) -> int:
    return num_weights(abstract_params(student.model))


def compiled_json(each: Compiled) -> dict[str, Any]:
    """What the compiler made, as numbers and short texts."""
    programs = {"step": each.step, "answers": each.answers}
    return {
        "name": each.name,
        "devices": each.devices,
        "layout": str(each.layout),
        "axes": list(each.layout.axes),
        "available_bytes": each.available,
        "useful_tokens": each.useful_tokens,
        "useful_flops": each.useful_flops,
        "tokens_per_second_per_device": list(each.tokens_per_second),
        "flops_utilisation": list(each.utilisation),
        "answer_rows": each.rows,
        "answer_tokens_per_second_per_device": each.answer_tokens_per_second,
        **{name: _program_json(program) for name, program in programs.items() if program},
    }


def _program_json(program: Program) -> dict[str, Any]:
    return {
        "held_bytes": program.held,
        "temporary_bytes": program.temporary,
        "flops": program.work.flops,
        "moved_bytes": program.work.bytes,
        "exchanges": [asdict(each) for each in program.exchanges],
        "seconds": program.seconds,
        "roofline_seconds": program.roofline,
        "in_turn_seconds": program.in_turn,
    }


def page_lines(
    config: Config,
    teacher: TeacherPlan,
    student: Student | None,
    fits: Sequence[Fit],
    compiled: Sequence[Compiled],
) -> list[str]:
    """The plan for a reader."""
    lines = plan_lines(config, teacher)
    if student is not None:
        lines += ["", *_student_lines(student)]
    for each in fits:
        lines += ["", *_fit_lines(each)]
    for each in compiled:
        lines += ["", *_compiled_lines(each)]
    return lines


def _student_lines(student: Student) -> list[str]:
    texts, work = student.texts, student.round
    how = "by its tokenizer" if texts.measured else "at 4 bytes a token: it has no tokenizer.json"
    usual = sum(texts.prompts) / len(texts.prompts)
    return [
        f"student: {_num_weights(student):,} weights; prompts of {texts.shared:,} tokens in common "
        f"and {usual:,.0f} of their own, counted {how}",
        f"round 1, if every rationale is kept and has half of its tokens: {work.rows:,} rows, "
        f"{work.steps:,} steps of {work.useful_tokens:,} tokens and "
        f"{work.step_flops / TERA:,.2f} TFLOP",
        f"its exams: {work.answers:,} answers, {work.answer_tokens:,.0f} tokens, "
        f"{work.exam_flops / TERA:,.0f} TFLOP",
    ]


def _fit_lines(each: Fit) -> list[str]:
    memory = asdict(each.memory)
    parts = ", ".join(f"{name} {size / GB:,.2f}" for name, size in memory.items())
    verdict = "fits" if each.fits else "does not fit"
    lines = [
        f"{each.name}: {verdict}",
        f"  mesh {each.layout}",
        f"  training, GB of each device: {parts}; {each.memory.total / GB:,.2f} of "
        f"{each.available / GB:,.2f}, without working memory",
    ]
    if each.exam is not None:
        lines.append(
            f"  exam, GB of each device: weights {each.exam.weights / GB:,.2f}, cache "
            f"{each.exam.cache / GB:,.2f} for {each.exam.rows:,} answers at a time"
        )
    lines.append(
        f"  at best: {_time(each.step_seconds)} a step, {_time(each.training_seconds)} of training "
        f"and {_time(each.exam_seconds)} of exams in round 1"
    )
    if not each.fits:
        lines.append(f"  nearest that fits: {each.nearest or 'nothing was found'}")
    return lines


def _compiled_lines(each: Compiled) -> list[str]:
    lines = [
        f"{each.name}, compiled for {each.devices:,} chips: fits",
        f"  mesh {each.layout}",
        *_program_lines(f"step of {each.useful_tokens:,} tokens", each.step, each.available),
        f"  training, per chip: {_range(*each.tokens_per_second)} useful tokens/s, "
        f"{_range(*each.utilisation, percent=True)} of peak",
    ]
    if each.answers is not None and each.answer_tokens_per_second is not None:
        title = f"one token for {each.rows:,} answers"
        lines += _program_lines(title, each.answers, each.available)
        lines.append(f"  exam, per chip: {_range(*each.answer_tokens_per_second)} tokens/s")
    return lines


def _program_lines(title: str, program: Program, available: float) -> list[str]:
    work = program.work
    seconds = ", ".join(f"{part} {1e3 * value:,.2f}" for part, value in program.seconds.items())
    total = program.held + program.temporary
    return [
        f"  {title}, on each chip:",
        f"    memory, GB: {program.held / GB:,.2f} held, {program.temporary / GB:,.2f} temporary; "
        f"{total / GB:,.2f} of {available / GB:,.2f}",
        f"    {work.flops / TERA:,.3f} TFLOP, {work.bytes / GB:,.2f} GB moved",
        *(f"    {_exchange(each)}" for each in sorted(program.exchanges, key=lambda x: -x.bytes)),
        f"    ms: {seconds}; {1e3 * program.roofline:,.2f} if all overlap, "
        f"{1e3 * program.in_turn:,.2f} if none",
    ]


def _exchange(each: Exchange) -> str:
    where = "the network" if each.crosses else "links"
    size, milliseconds = f"{each.bytes / GB:,.3f} GB", f"{1e3 * each.seconds:,.2f} ms"
    return f"{each.kind} along {each.axes or 'nothing'}: {size} sent over {where}, {milliseconds}"


def _range(low: float, high: float, *, percent: bool = False) -> str:
    return f"{low:.0%} to {high:.0%}" if percent else f"{low:,.0f} to {high:,.0f}"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
