"""The loop: exam, teaching, training, dev exam, until the student stops improving.

Every stage asks first whether its file is finished, so the same call starts a run, continues it
wherever it was interrupted, and does nothing to a finished one.

Of several processes all walk through the same stages. What only the first may touch it tells the
others.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax import run_folder
from distill_jax.bucket import local_folder
from distill_jax.config import SELF, TEACHER, Config, ConfigError, parse_config
from distill_jax.config_file import differences
from distill_jax.exam import accuracy, take_exam
from distill_jax.mirror import hold
from distill_jax.plan.savings import SAVE_IN_EXAM, explained, save_in_training
from distill_jax.plan.work import read_texts
from distill_jax.processes import gather, is_main, tell, tell_each
from distill_jax.progress import Progress
from distill_jax.records import Attempt, Question, Rationale, Split, from_json, to_json
from distill_jax.rows import Rows, make_rows
from distill_jax.run_folder import (
    Partial,
    round_folder,
    sort_rows,
    stream_records,
    stream_rows,
    timed,
    write_records,
    write_rows,
)
from distill_jax.school import School, open_school
from distill_jax.sinks import SinkName
from distill_jax.syllabus import choose, read_sources
from distill_jax.teacher.lesson import mark_attempts
from distill_jax.teaching import (
    check_teacher,
    exam_prompt,
    is_mistake,
    judge,
    teach,
    wants_rationales,
)
from distill_jax.training import make_course, train_round

NO_MISTAKES = "every training question was answered right"
NOTHING_KEPT = "none of the teacher's answers could be trained on"


def run(
    config: Config, *, progress: Progress | None = None, sinks: Sequence[SinkName] = ()
) -> dict[str, object]:
    """Teaches the student round by round; continues a run that was interrupted.

    Args:
      config: All settings. `config.folder` is made, or continued if it is there.
      progress: Where to show what is going on; stderr unless told otherwise.
      sinks: Where the figures of training go, besides `metrics.jsonl`.

    Returns:
      What `result.json` holds: `stop_reason`, `chosen_round`, `rounds`.

    Raises:
      ConfigError: the run can't start as configured. Nothing has been spent.
      BucketError: the run lies in a bucket that can't be reached any more. What it did is here.
      TeacherError: the teacher refused, or the budget is spent. All answers paid for are in the
        ledger; the same call goes on from there.
      TrainingDiverged: the loss is not a number any more.
      OutOfMemory: a device is too small; says what to lower.

    Source:
      Wang et al., "Democratizing Reasoning Ability" (EMNLP 2023), algorithm 1.
    """
    progress = progress or Progress(quiet=not is_main())
    _compare(config)
    folder = local_folder(config.folder)
    with hold(folder, progress.note):
        tell("opening the run folder", lambda: str(run_folder.open_run(config)))
        if not tell("looking for a result", (folder / "result.json").exists):
            tell("looking for the teacher's key", lambda: check_teacher(config))
            school = open_school(config, folder, progress, sinks)
            _sit(school, 0, "dev", weights_round=0)
            finished, reason = 0, ""
            while not (reason := reason or _reason_to_stop(school, finished)):
                reason = _play_round(school, finished + 1)
                finished += not reason
            _finish(school, finished, reason)
        return tell("reading the result", lambda: run_folder.read_json(folder / "result.json"))


def _compare(config: Config) -> None:
    """Makes sure that all processes run the same."""
    first, *others = map(parse_config, gather("comparing", config.model_dump(mode="json")))
    if others and config.student.model == TEACHER:
        raise ConfigError(f"student.model={TEACHER} needs no devices; run it as one process.")
    for index, other in enumerate(others, start=1):
        changed = differences(first, other)
        if changed:
            raise ConfigError(
                f"process {index} runs with other settings than process 0: {'; '.join(changed)}."
            )


def _play_round(school: School, round_index: int) -> str:
    """One round; returns why it could not be played, or an empty string."""
    exam = _sit(school, round_index, "exam", weights_round=round_index - 1)
    if round_index > 1 and not tell("looking for mistakes", lambda: _has_mistakes(exam)):
        return NO_MISTAKES
    _teach(school, round_index, exam)
    _judge(school, round_index)
    reason = _train(school, round_index, exam)
    if not reason:
        _sit(school, round_index, "dev", weights_round=round_index)
    return reason


def _has_mistakes(exam: Path) -> bool:
    return any(map(is_mistake, stream_records(exam, Attempt)))


def _reason_to_stop(school: School, finished: int) -> str:
    """Why no further round is played after `finished` rounds; empty to go on."""
    rounds = school.config.rounds
    if finished >= rounds.max:
        return f"the limit of {rounds.max} rounds"
    if not school.questions["dev"] or not finished:
        return ""
    marks = tell("comparing the rounds", lambda: _dev_accuracies(school, finished))
    since_best = finished - int(np.argmax(marks))
    if since_best >= rounds.patience:
        return f"dev accuracy has not risen for {since_best} round{'s' * (since_best > 1)}"
    return ""


def _dev_accuracies(school: School, finished: int) -> list[float]:
    paths = [round_folder(school.folder, r) / "dev.jsonl" for r in range(finished + 1)]
    return [accuracy(stream_records(path, Attempt)) for path in paths]


def _finish(school: School, finished: int, reason: str) -> None:
    """Chooses a round, sits the test with it and with the untrained student, and says so."""
    chosen = finished
    if school.questions["dev"] and school.config.rounds.select == "best":
        marks = tell("choosing a round", lambda: _dev_accuracies(school, finished))
        chosen = int(np.argmax(marks))
    if school.questions["test"]:
        exams = [_sit(school, r, "test", weights_round=r) for r in sorted({0, chosen})]
        write_rows(school.folder / "test.jsonl", chain.from_iterable(map(stream_rows, exams)))
    result = {"stop_reason": reason, "chosen_round": chosen, "rounds": finished}
    run_folder.write_json(school.folder / "result.json", result)


def _sit(
    school: School,
    round_index: int,
    stage: str,
    *,
    weights_round: int,
    asked: Sequence[Question] | None = None,
) -> Path:
    """The file of one exam's attempts, in the order of the questions; takes the exam if need be.

    `exam` asks the training questions for a greedy answer and samples; `dev` and `test` ask their
    questions for the greedy answer alone; `hinted` asks those in `asked`, and shows the answer.
    """
    path = round_folder(school.folder, round_index) / f"{stage}.jsonl"
    if tell(f"looking for {path.name}", path.exists):
        return path
    split: Split = "dev" if stage == "dev" else "test" if stage == "test" else "train"
    questions = school.questions[split] if asked is None else asked
    config, hinted = school.config, stage == "hinted"
    samples = {"exam": config.exam.samples, "hinted": config.teacher.samples - 1}.get(stage, 0)
    part = Partial(path)
    part.keep(len(part) - len(part) % (1 + samples))  # whole questions only
    done = set(tell_each("looking who is done", lambda: _ids(run_folder.partial_path(path))))
    if len(done) < len(questions):
        sitting = take_exam(
            questions,
            school.sitting(weights_round, samples=samples),
            prompt=partial(exam_prompt, config, hint=hinted),
            round_index=weights_round,
            done=done,
        )
        title = f"{split} exam" if split != "train" else "hinted exam" if hinted else "exam"
        with (
            timed(school.folder, round_index, stage),
            explained(lambda: SAVE_IN_EXAM),
            school.progress.stage(
                f"{title}, round {round_index}",
                total=len(questions),
                unit="questions",
                done=len(done),
            ) as advance,
        ):
            for attempts in sitting:
                part.append(map(to_json, attempts))
                advance(1)
    part.close()
    if is_main():
        finish_exam(path, questions, samples)
    return path


def finish_exam(path: Path, questions: Sequence[Question], samples: int) -> None:
    """Makes the partial file of an exam, in any order, its finished one in order."""
    place = {question.id: index for index, question in enumerate(questions)}
    count = sort_rows(path, lambda row: (place[row["question_id"]], row["sample_index"]))
    assert count == len(questions) * (1 + samples), "every question is sat exactly once"


def _ids(path: Path) -> Iterator[str]:
    """The questions of rows, each once where its rows stand together."""
    return (id for id, _ in groupby(row["question_id"] for row in stream_rows(path)))


def _hear(path: Path) -> Iterator[Attempt]:
    """The attempts of a finished exam, which the first process reads to all."""
    return (from_json(Attempt, row) for row in tell_each("reading", lambda: stream_rows(path)))


def _teach(school: School, round_index: int, exam: Path) -> None:
    """Leaves the round's lesson in its file: the teacher's, or the student's own. Or an empty one.

    It is empty where the student learns bare answers, which the questions hold.
    """
    path, config = round_folder(school.folder, round_index) / "lesson.jsonl", school.config
    if tell(f"looking for {path.name}", path.exists):
        return

    def ask() -> None:
        with timed(school.folder, round_index, "teach"):
            lesson = teach(
                config,
                school.folder,
                school.questions["train"],
                stream_records(exam, Attempt),
                round_index=round_index,
                progress=school.progress,
            )
            write_records(path, lesson)

    if not wants_rationales(config):
        write_records(path, ())
    elif config.teacher.url == SELF:
        write_records(path, _teach_oneself(school, round_index, exam))
    else:
        tell(f"teaching, round {round_index}", ask)


def _judge(school: School, round_index: int) -> None:
    """Leaves those of a round's own rationales that the teacher approves of, if it is to judge."""
    config = school.config
    path = round_folder(school.folder, round_index) / "judged.jsonl"

    def ask() -> None:
        if path.exists():
            return
        with timed(school.folder, round_index, "judge"):
            approved = judge(
                config,
                school.folder,
                school.questions["train"],
                [*read_sources(config, path.parent)],
                round_index=round_index,
                progress=school.progress,
            )
            write_records(path, approved)

    if "judged" in config.train.rows:
        tell(f"judging, round {round_index}", ask)


def _teach_oneself(school: School, round_index: int, exam: Path) -> Iterator[Rationale]:
    """The student's own attempts; where none is right, those that it makes once shown the answer.

    Source: STaR (Zelikman et al., NeurIPS 2022).
    """
    questions, samples = school.questions["train"], school.config.teacher.samples
    exams = [exam]
    if school.config.teacher.hint:
        right = {a.question_id for a in _hear(exam) if a.sample_index < samples and a.correct}
        stuck = [question for question in questions if question.id not in right]
        exams.append(
            _sit(school, round_index, "hinted", weights_round=round_index - 1, asked=stuck)
        )
    tried = (_first_samples(path, samples) for path in exams)
    return mark_attempts(questions, tried, round_index=round_index)


def _first_samples(exam: Path, samples: int) -> Iterator[Attempt]:
    return (a for a in stream_records(exam, Attempt) if a.sample_index < samples)


def _train(school: School, round_index: int, exam: Path) -> str:
    """Trains on the round's rationales, unless that is done; returns why it can't, or nothing."""
    config, student = school.config, school.student
    assert student is not None, "a teacher that sits exams is not trained"
    folder = round_folder(school.folder, round_index)
    if tell("looking for metrics.jsonl", (folder / "metrics.jsonl").exists):
        return ""
    left_out: Counter[str] = Counter()
    rows = make_rows(
        _choose(school, round_index, left_out),
        _hear(exam),
        {question.id: question for question in school.questions["train"]},
        tokenizer=student.tokenizer,
        prompts={form: partial(exam_prompt, config, form=form) for form in config.train.targets},
        max_length=student.model.max_positions,
        seed=config.seed,
    )
    run_folder.update_round(
        school.folder,
        round_index,
        rows=len(rows),
        dropped_rows={**dict(sorted(left_out.items())), **rows.dropped},
        cut_mistakes=rows.num_cut_mistakes,
        pairs=rows.num_pairs,
        target_tokens=rows.num_targets,
        soft_tokens=rows.num_soft,
        steps=len(make_course(config, student.model, student.mesh, rows, round_index)),
    )
    if not rows:
        return _explain_no_rows(rows, student.model.max_positions)
    start = round_index - 1 if config.train.start == "previous" else 0

    def advice() -> str:
        texts = read_texts(config, school.questions["train"], student.tokenizer)
        return save_in_training(config, student.weights.model, texts, student.mesh)

    with timed(school.folder, round_index, "train"), explained(advice):
        trained, frozen = train_round(
            config,
            student.weights.model,
            student.mesh,
            rows,
            partial(student.weights.take, start),
            folder,
            round_index=round_index,
            progress=school.progress,
            sinks=school.sinks,
        )
    student.weights.put(round_index, trained, frozen)
    return ""


def _explain_no_rows(rows: Rows, max_positions: int) -> str:
    """Why nothing can be trained on, though the teacher was asked."""
    num_long = rows.dropped.get("too_long", 0)
    if not num_long:
        return NOTHING_KEPT
    return (
        f"all rows, {num_long:,}, are too long for the student's {max_positions:,} positions: "
        "name a student with more positions, show it fewer task.demonstrations, or lower "
        f"teacher.max_tokens, which buys all answers anew; {run_folder.ANOTHER_FOLDER}"
    )


def _choose(school: School, round_index: int, left_out: Counter[str]) -> Iterator[Rationale]:
    """The rationales of a round, which the first process reads to all, and counts the others."""

    def pick() -> Iterator[dict[str, Any]]:
        questions, texts = school.questions["train"], school.exam_texts
        settings: Any = {"round_index": round_index, "left_out": left_out}
        return map(to_json, choose(school.config, school.folder, questions, texts, **settings))

    return (from_json(Rationale, row) for row in tell_each("choosing rationales", pick))
