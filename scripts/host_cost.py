"""Shows what a run costs its host: time and peak memory of each stage that needs no accelerator.

    python scripts/host_cost.py [--questions 1000000] [--samples 4] [--stages NAME ...] [--json]

Questions, completions and rationales are made up, with the lengths of real ones, and lie in a
temporary folder. Every stage runs in a process of its own, so that its peak is its own; what Python
and the imports take is in it. Exams are seated on 64 desks of 64 slots, and answers end by chance.
"""

import argparse
import contextlib
import itertools
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

DESKS, SLOTS, ANSWER = 64, 64, 64  # tokens of an answer, on average
RATIONALES = 2  # kept, of a question
BATCHES = 50  # packed, to tell what one costs
SENTENCE = "Ben has {a} apples and buys {b} more, then he gives {c} of them to his sister. "
LIMIT_GB = 4.0

Stage = Callable[[Path, int, int], int]
"""Takes the folder, the number of questions and of samples; returns what it handled."""


def make_inputs(folder: Path, questions: int, samples: int) -> None:
    """Writes a file of questions, and the exam and lesson of a round, a line at a time."""
    draw, opened = random.Random(0), folder / "round_02"
    opened.mkdir()
    with (
        (folder / "mine.jsonl").open("w") as asked,
        (opened / "exam.jsonl").open("w") as exam,
        (opened / "lesson.jsonl").open("w") as lesson,
    ):
        for index in range(questions):
            a, b, c = (draw.randrange(2, 100) for _ in range(3))
            text = SENTENCE.format(a=a, b=b, c=c) * 2 + "How many are left?"
            row = {"id": f"q/{index}", "question": text, "answer": a + b - c}
            asked.write(json.dumps(row) + "\n")
            for place in range(1 + samples):
                exam.write(json.dumps(_attempt(row, place, draw)) + "\n")
            for place in range(RATIONALES):
                lesson.write(json.dumps(_rationale(row, place, draw)) + "\n")


def _attempt(row: dict[str, Any], place: int, draw: random.Random) -> dict[str, Any]:
    right = draw.random() < 0.5
    answer = str(row["answer"] + (not right))
    text = f"He has {draw.random()} of them, so that it is {answer}. " * 4 + f"Answer: {answer}"
    counts = {"round_index": 0, "sample_index": place, "cut": False, "num_tokens": ANSWER}
    return {"question_id": row["id"], "text": text, "answer": answer, "correct": right, **counts}


def _rationale(row: dict[str, Any], place: int, draw: random.Random) -> dict[str, Any]:
    text = f"First there are {draw.random()} apples, and then there are fewer of them. " * 3
    kept = {"answer": str(row["answer"]), "verdict": "kept"}
    return {
        "question_id": row["id"], "round_index": 1, "sample_index": place, "text": text, **kept
    }  # fmt: skip


def _config(folder: Path, **teacher: Any) -> Any:
    from distill_jax.config_file import make_config

    task = {"name": str(folder / "mine.jsonl"), "dev_fraction": 0.0}
    values = {"folder": "-", "task": task, "student": {"model": "-"}, "teacher": teacher}
    return make_config(values, [])


def _questions(folder: Path) -> list[Any]:
    from distill_jax.school import open_questions

    questions, _, _ = open_questions(_config(folder), folder)
    return questions["train"]


def _tokenizer() -> Any:
    from distill_jax.scratch import make_tokenizer
    from distill_jax.tokenizer import Tokenizer

    return Tokenizer(make_tokenizer())


def load_questions(folder: Path, questions: int, samples: int) -> int:
    """The user's file, as `run` reads it and keeps it in its folder."""
    return len(_questions(folder))


def word_prompts(folder: Path, questions: int, samples: int) -> int:
    """The prompts of an exam, with demonstrations, and their tokens."""
    from distill_jax.config import ExamConfig
    from distill_jax.generate import make_generate
    from distill_jax.prompts import demonstrations, exam_prompt
    from distill_jax.scratch import make_model
    from distill_jax.student.sharding import make_mesh

    tokenizer, examples = _tokenizer(), demonstrations("gsm8k")
    model = replace(make_model(64, 1, tokenizer.num_tokens), max_positions=2048)
    settings: Any = {"exam": ExamConfig(samples=samples), "compute_dtype": "float32"}
    generate = make_generate(model, tokenizer, make_mesh(1, 1, 1), **settings)
    asked = _questions(folder)
    prompts = (exam_prompt(question, demonstrations=examples) for question in asked)
    ids = [question.id for question in asked]
    return len(generate.ask(prompts, ids, samples, (0, 1)))


def seat_exam(folder: Path, questions: int, samples: int) -> int:
    """The bookkeeping of an exam, with devices that answer at once."""
    import numpy as np

    from distill_jax.on_demand import OnDemand
    from distill_jax.slots import CALL, Prompt, Row, Seating
    from distill_jax.student.decode import Chosen

    draw, key = np.random.default_rng(0), np.zeros(2, np.uint32)
    lengths = draw.integers(30, 90, questions)

    def make(index: int) -> Prompt:
        prompt = Prompt(index, [0] * int(lengths[index]))
        prompt.rows.extend(Row(prompt, place, 4 * ANSWER, key) for place in range(1 + samples))
        return prompt

    prompts = OnDemand(questions, make)
    seating = Seating(prompts, owed=range(questions), desks=DESKS, slots=SLOTS)
    done = 0
    while not seating.ended:
        while seating.read() is not None:
            pass
        seating.seat()
        rows = DESKS * seating.sizes.slots
        tokens = np.zeros((rows, CALL), np.int32)
        stopped = draw.random(rows) < CALL / ANSWER
        arrays: Any = (tokens, np.full(rows, CALL, np.int32), stopped)
        done += sum(len(prompt.rows) for prompt in seating.take(Chosen(*arrays)))
    return done


def mark_answers(folder: Path, questions: int, samples: int) -> int:
    """Marking what comes back, keeping it as an exam does while it is sat, and sorting it."""
    from distill_jax.exam import take_exam
    from distill_jax.records import Completion, to_json
    from distill_jax.rounds import finish_exam
    from distill_jax.run_folder import Partial

    texts = ["He has 12 of them and 3 more. " * 4 + f"Answer: {n}" for n in range(1 + samples)]
    answers = [Completion(text, "stop", ANSWER) for text in texts]

    def generate(
        prompts: Iterable[str], ids: Sequence[str], done: set[int]
    ) -> Iterator[tuple[int, Any]]:
        yield from ((index, answers) for index, _ in enumerate(prompts))

    asked, path = _questions(folder), folder / "sat.jsonl"
    part = Partial(path)
    for attempts in take_exam(asked, generate, prompt=lambda q: q.text, round_index=0):
        part.append(map(to_json, attempts))
    part.close()
    finish_exam(path, asked, samples)
    return len(part)


def find_mistakes(folder: Path, questions: int, samples: int) -> int:
    """The mistakes in an exam's file."""
    from distill_jax.records import Attempt
    from distill_jax.run_folder import stream_records
    from distill_jax.teaching import find_mistakes

    return len(find_mistakes(stream_records(folder / "round_02" / "exam.jsonl", Attempt)))


def ask_teacher(folder: Path, questions: int, samples: int) -> int:
    """A lesson by way of the ledger, from a teacher that answers at once."""
    from distill_jax.progress import Progress
    from distill_jax.records import Attempt
    from distill_jax.run_folder import stream_records, write_records
    from distill_jax.teacher import transport
    from distill_jax.teaching import teach

    text = "First there are some apples, and then there are fewer of them. " * 3
    choices = [
        {"index": i, "finish_reason": "stop", "message": {"content": f"{text}\nAnswer: {i}"}}
        for i in range(samples)
    ]
    usage = {"prompt_tokens": 200, "completion_tokens": samples * ANSWER}
    body = json.dumps({"id": "x", "model": "m", "choices": choices, "usage": usage})

    class Instant:
        async def send(self, *_: Any, **__: Any) -> transport.Raw:
            return transport.Raw(body, None)

    @contextlib.asynccontextmanager
    async def connect(*_: Any, **__: Any) -> AsyncIterator[Instant]:
        yield Instant()

    config = _config(folder, url="http://127.0.0.1:1/v1", model="m", samples=samples)
    exam = stream_records(folder / "round_02" / "exam.jsonl", Attempt)
    settings: Any = {"round_index": 2, "progress": Progress(quiet=True)}
    with mock.patch("distill_jax.teacher.client.connect", connect):
        lesson = teach(config, folder, _questions(folder), exam, **settings)
        write_records(folder / "said.jsonl", lesson)
    return sum(1 for _ in (folder / "said.jsonl").open())


def pack_batches(folder: Path, questions: int, samples: int) -> int:
    """The rows of a round, its order and shapes, and the first of its batches."""
    from distill_jax.batches import Course
    from distill_jax.contamination import ExamTexts
    from distill_jax.packing import make_grid
    from distill_jax.prompts import exam_prompt
    from distill_jax.records import Attempt
    from distill_jax.rows import make_rows
    from distill_jax.run_folder import stream_records
    from distill_jax.student.objective import Objective
    from distill_jax.syllabus import choose

    asked, settings = _questions(folder), {"round_index": 2, "left_out": Counter()}
    rows = make_rows(
        choose(_config(folder), folder, asked, ExamTexts([]), **settings),
        stream_records(folder / "round_02" / "exam.jsonl", Attempt),
        {question.id: question for question in asked},
        tokenizer=_tokenizer(),
        prompts={"rationale": lambda question: exam_prompt(question, demonstrations="")},
        max_length=2048,
        seed=0,
    )
    grid = make_grid(1024, microbatches=1, shards=256)
    course = Course(rows, Objective(), 1024, grid, seed=0, round_index=1, epochs=1)
    batches = itertools.islice(course.batches(), BATCHES)
    return sum(int(batch.counts.real) for _, batch in batches)


STAGES: dict[str, Stage] = {
    "loading questions": load_questions,
    "prompts": word_prompts,
    "seating an exam": seat_exam,
    "marking and keeping answers": mark_answers,
    "finding mistakes": find_mistakes,
    "asking the teacher": ask_teacher,
    "rows, order and batches": pack_batches,
}


def measure(name: str, folder: Path, questions: int, samples: int) -> dict[str, Any]:
    """Runs one stage in a process of its own."""
    words = [sys.executable, __file__, "--questions", str(questions), "--samples", str(samples)]
    words += ["--stages", name, "--folder", str(folder)]
    environ = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environ)
    return json.loads(done.stdout)


def run_stage(name: str, folder: Path, questions: int, samples: int) -> None:
    """Runs one stage here, and prints what it took."""
    start, busy = time.perf_counter(), time.process_time()
    handled = STAGES[name](folder, questions, samples)
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - busy}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    print(json.dumps({"stage": name, "handled": handled, **times, "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    sizes = (options.questions, options.samples)
    if options.folder:
        run_stage(options.stages[0], options.folder, *sizes)
        return
    found = []
    with tempfile.TemporaryDirectory() as folder:
        make_inputs(Path(folder), *sizes)
        if not options.json:
            print(f"{sizes[0]:,} questions, {sizes[1]} samples besides the greedy answer")
        for name in options.stages:
            found.append(measure(name, Path(folder), *sizes))
            if not options.json:
                show(found[-1])
    if options.json:
        print(json.dumps({"questions": sizes[0], "samples": sizes[1], "stages": found}))


def show(stage: dict[str, Any]) -> None:
    """Prints what one stage took."""
    over = f", over {LIMIT_GB:.0f}" if stage["peak_gb"] > LIMIT_GB else ""
    times = f"{stage['seconds']:9.1f} s, {stage['cpu_seconds']:9.1f} s of a core"
    print(f"{stage['stage']:30}{times}, {stage['peak_gb']:6.2f} GB{over}", flush=True)


if __name__ == "__main__":
    main()
