"""A run folder whose every count is known beforehand, written bit by bit.

`write_run(Path("runs/sample"))` makes one, to look at a report without running anything.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from distill_jax.config import Config, parse_config
from distill_jax.config_file import to_yaml
from distill_jax.records import Attempt, Question, Rationale, Split, Verdict, to_json
from distill_jax.run_folder import (
    partial_path,
    round_folder,
    update_round,
    write_json,
    write_manifest,
    write_rows,
)
from distill_jax.teacher.ledger import Ledger

HOSTILE = (
    "</script><script>alert(1)</script>",
    '" onmouseover="alert(2)" \' autofocus=\'',
    "<img src=http://evil.example/x.png><!-- </pre></details>",
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x9b2J",
    "\u202egnorw\u2066 \ud800 \u2028",
    "{{ 7 * 7 }} {% raw %} $\\frac{ [bold]x[/bold] &lt;b&gt;",
)
NUM = {"train": 80, "dev": 40, "test": 50}
SAMPLES = 2
TRAIN_RIGHT = {1: 4, 2: 30, 3: 55}  # by the round that the exam opens
DEV_RIGHT = {0: 2, 1: 14, 2: 26, 3: 33}
TEST_RIGHT = {0: 3, 3: 40}
STEPS = {1: 150, 2: 90, 3: 450}
VERDICTS: tuple[Verdict, ...] = (  # dealt out in turn, four to a question
    *("wrong", "cut", "unreadable", "failed"),
    *("kept", "kept", "kept", "kept"),
    *("duplicate", "kept"),
)


def sample_config(folder: Path, **knobs) -> Config:
    return parse_config(
        {
            "folder": str(folder),
            "task": {"name": "arithmetic", "num_train": NUM["train"], "num_test": NUM["test"]},
            "student": {"model": "scratch", "compute_dtype": "float32"},
            "exam": {"samples": SAMPLES},
            "rounds": {"max": 3},
            **knobs,
        }
    )


def sample_questions() -> list[Question]:
    """Odd ones have 3 steps, even ones 2; every seventh tries to break out of the page."""
    return [
        Question(
            id=f"arithmetic/{split}/{i}" + (f"/../{HOSTILE[i % 6]}" if i % 7 == 0 else ""),
            text=f"Question {i} of {split}? " + (HOSTILE[i % 6] if i % 7 == 0 else ""),
            answer=str(i),
            split=split,
            kind="numeric",
            group="3 steps <b>" if i % 2 else "2 steps",
        )
        for split in ("train", "dev", "test")
        for i in range(NUM[split])
    ]


def sit(questions: list[Question], right: int, round_index: int, samples: int) -> list[Attempt]:
    """The first `right` greedy answers are right; of the rest, one in 5 can't be read.

    One in 10 of the wrong ones is cut. Samples are always wrong.
    """
    rows = []
    for i, question in enumerate(questions):
        for sample in range(samples + 1):
            correct = sample == 0 and i < right
            answer = question.answer if correct else None if i % 5 == 0 else "-1"
            text = HOSTILE[i % 6] if i % 3 == 0 else f"It is {i} and {i}."
            ending = "." if correct and i % 2 else ""  # "7." is right by both rules
            rows.append(
                Attempt(
                    question_id=question.id,
                    round_index=round_index,
                    sample_index=sample,
                    text=f"{text}\nAnswer: {answer}{ending}",
                    answer=answer,
                    correct=correct,
                    cut=not correct and i % 10 == 3,
                    num_tokens=7,
                )
            )
    return rows


def teach(questions: list[Question], round_index: int, longest: int) -> list[Rationale]:
    return [
        Rationale(
            question_id=question.id,
            round_index=round_index,
            sample_index=slot,
            text="x" * longest if (i, slot) == (0, 0) else f"Because. {HOSTILE[(i + slot) % 6]}",
            answer=question.answer,
            verdict=VERDICTS[(4 * i + slot) % 10],
        )
        for i, question in enumerate(questions)
        for slot in range(4)
    ]


def log(round_index: int, steps: int) -> list[dict]:
    return [
        {
            "round": round_index,
            "step": step,
            "epoch": 0,
            "loss": 2.0 / (1 + step / 30),
            "lm_loss": 1.5 / (1 + step / 30),
            "reflection_loss": 1.0 / (1 + step / 10),
            "seconds": 0.1,
        }
        for step in range(steps)
    ]


def dump(rows: list) -> list[dict]:
    """Rows as the run writes them: they hold no lone surrogates, which UTF-8 has no room for."""
    text = json.dumps([row if isinstance(row, dict) else to_json(row) for row in rows])
    return json.loads(text.replace("\\ud800", "\\u0007"))


def begin(path: Path, rows: list[dict]) -> None:
    """Half of a stage's rows, and a line that is being written."""
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps(row) for row in rows[: len(rows) // 2]]
    partial_path(path).write_text("".join(f"{line}\n" for line in lines) + '{"question_id": "ar')


def run_stages(folder: Path, *, longest: int = 3000) -> Iterator[tuple[str, int, int]]:
    """Writes a run bit by bit; yields the phase, its round and what is done of it, after each."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(sample_config(folder)))
    yield "pretraining", 0, 0
    questions = sample_questions()
    write_rows(folder / "questions.jsonl", dump(questions))
    write_manifest(folder, {"mesh": {"data": 1}, "note": HOSTILE[0]})
    split: dict[Split, list[Question]] = {
        name: [q for q in questions if q.split == name] for name in ("train", "dev", "test")
    }
    (round_folder(folder, 0) / "student").mkdir()
    yield "dev exam", 0, 0
    write_rows(round_folder(folder, 0) / "dev.jsonl", dump(sit(split["dev"], DEV_RIGHT[0], 0, 0)))
    yield "exam", 1, 0
    for index in (1, 2, 3):
        yield from _round_stages(folder, index, split, longest)
    last = round_folder(folder, 3)
    zero = dump(sit(split["test"], TEST_RIGHT[0], 0, 0))
    chosen = dump(sit(split["test"], TEST_RIGHT[3], 3, 0))
    write_rows(round_folder(folder, 0) / "test.jsonl", zero)
    begin(last / "test.jsonl", chosen)
    yield "test exam", 3, 75
    write_rows(last / "test.jsonl", chosen)
    write_rows(folder / "test.jsonl", zero + chosen)
    result = {"stop_reason": "the limit of 3 rounds", "chosen_round": 3, "rounds": 3}
    write_json(folder / "result.json", result)
    yield "done", 3, 0


def _round_stages(
    folder: Path, index: int, split: dict[Split, list[Question]], longest: int
) -> Iterator[tuple[str, int, int]]:
    path = round_folder(folder, index)
    exam = dump(sit(split["train"], TRAIN_RIGHT[index], index - 1, SAMPLES))
    begin(path / "exam.jsonl", exam)
    yield "exam", index, 40
    write_rows(path / "exam.jsonl", exam)
    yield "teaching", index, 0
    asked = split["train"] if index == 1 else split["train"][TRAIN_RIGHT[index] :]
    with Ledger(folder / "ledger.sqlite") as ledger:
        intent = ledger.reserve({"round": index}, [0], usd=9.0, limit_usd=None)
        assert intent is not None
        ledger.fail(intent, "test", "none", usd=0.01 * len(asked))
    lesson = teach(asked, index, longest)
    write_rows(path / "lesson.jsonl", dump(lesson))
    rows = sum(row.verdict == "kept" for row in lesson)
    dropped = {"too long <b>": 2}
    update_round(
        folder, index, rows=rows - 2, pairs=rows - 9, dropped_rows=dropped, steps=STEPS[index]
    )
    metrics = log(index, STEPS[index])
    begin(path / "metrics.jsonl", metrics)
    yield "training", index, STEPS[index] // 2
    write_rows(path / "metrics.jsonl", metrics)
    yield "dev exam", index, 0
    seconds = {"exam": 61.5, "teach": 2, "train": 100.25, "dev": 3.25}
    update_round(folder, index, seconds=seconds)
    write_rows(path / "dev.jsonl", dump(sit(split["dev"], DEV_RIGHT[index], index, 0)))
    yield ("exam", index + 1, 0) if index < 3 else ("test exam", 3, 0)


def write_run(folder: Path, *, longest: int = 3000) -> Path:
    """Writes the whole sample run."""
    for _ in run_stages(folder, longest=longest):
        pass
    return folder
