"""Times an exam beside transformers' `generate`: same weights, same questions, one run.

    python scripts/bench_exam.py                          # 6 layers x 512 on a CPU
    python scripts/bench_exam.py --layers 28 --width 4096 --heads 16 --vocab 50400 --dtype bfloat16

`generate` is called as the original code calls it: 4 questions at a time, prompts with their
demonstrations padded on the left, 4 sampled answers to each. Random weights don't know when to end,
so every answer's length is drawn beforehand from the spread of real rationales, the same for both
sides: ours as the limits of rows, theirs by a stopping criterion that ends each row at its length.
Nothing else ends a row on either side.

The floor is the arithmetic that the answers need (each prompt read once, no padding, no empty slot)
over the rate of a large matrix product measured in the same run.
"""

import dataclasses
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

QUESTIONS_AT_ONCE, COMPILE_EVENTS = 4, "/jax/core/compile/"


@dataclasses.dataclass(frozen=True)
class Exam:
    """What is asked, and how long every answer gets."""

    common: list[int]
    questions: list[list[int]]
    lengths: np.ndarray  # [questions, samples]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def main(
    layers: int = 6,
    width: int = 512,
    heads: int = 8,
    vocab: int = 16_384,
    questions: int = 64,
    samples: int = 4,
    demonstrations: int = 330,
    question: int = 60,
    answer: Annotated[int, typer.Option(help="mean tokens; 95% have at most 1.6 times that")] = 76,
    slots: Annotated[int, typer.Option(help="0: sized from free memory")] = 0,
    dtype: str = "float32",
    repeats: int = 3,
    pytorch: Annotated[bool, typer.Option(help="time `generate` too")] = True,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Prints generated tokens per second of both sides, their ratio, and where ours spends them."""
    exam = make_exam(vocab, questions, samples, demonstrations, question, answer)
    shape = {
        "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024,
        "vocab_size": vocab,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        published = publish(shape, Path(directory), dtype)
        figures: dict[str, Any] = {"ours": time_ours(Path(directory), exam, slots, dtype, repeats)}
        if pytorch:
            seconds = time_generate(published, exam)
            figures["pytorch"] = {"seconds": seconds, "tokens_per_second": exam.tokens / seconds}
            speeds = (figures[side]["tokens_per_second"] for side in ("ours", "pytorch"))
            figures["ratio"] = {"tokens_per_second": next(speeds) / next(speeds)}
    print(json.dumps(rounded(figures), indent=None if as_json else 2))


def make_exam(
    vocab: int, questions: int, samples: int, demonstrations: int, question: int, answer: int
) -> Exam:
    """Random tokens; lengths spread like GSM8K's questions and a teacher's rationales."""
    rng = np.random.default_rng(0)

    def lengths(mean: int, spread: float, shape: Any) -> np.ndarray:
        drawn = rng.lognormal(np.log(mean) - spread**2 / 2, spread, shape)
        return np.clip(drawn, 8, 2.6 * mean).astype(int)

    asked = lengths(question, 0.33, questions)
    return Exam(
        rng.integers(3, vocab, demonstrations).tolist(),
        [rng.integers(3, vocab, length).tolist() for length in asked],
        lengths(answer, 0.317, (questions, samples)),
    )


def publish(shape: dict[str, Any], directory: Path, dtype: str) -> Any:
    """A random GPT-2 of transformers, saved where ours reads it."""
    import torch
    import transformers

    torch.manual_seed(0)
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model.save_pretrained(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device, getattr(torch, dtype)).eval()


def time_generate(model: Any, exam: Exam) -> float:
    """Seconds that `generate` takes for all questions."""
    import torch
    from transformers import StoppingCriteriaList

    samples = exam.lengths.shape[1]

    def answer(first: int) -> None:
        asked = exam.questions[first : first + QUESTIONS_AT_ONCE]
        ends = torch.tensor(exam.lengths[first : first + QUESTIONS_AT_ONCE].ravel())
        rows = [[*exam.common, *tokens] for tokens in asked]
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])

        def ended(tokens: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return (tokens.shape[1] - longest >= ends).to(tokens.device)

        with torch.no_grad():
            model.generate(
                ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=True,
                top_k=50,
                temperature=1.0,
                num_return_sequences=samples,
                max_new_tokens=int(ends.max()),
                stopping_criteria=StoppingCriteriaList([ended]),
                eos_token_id=None,
                pad_token_id=0,
            )

    answer(0)  # once to warm up
    start = time.perf_counter()
    for first in range(0, len(exam.questions), QUESTIONS_AT_ONCE):
        answer(first)
    return time.perf_counter() - start


def time_ours(directory: Path, exam: Exam, slots: int, dtype: str, repeats: int) -> dict[str, Any]:
    """Tokens per second of our exam with its programs compiled, and what they are made of."""
    import jax

    from distill_jax.engine import Engine
    from distill_jax.generate import free_memory, plan_slots, sit
    from distill_jax.student.model import abstract_params, logical_axes
    from distill_jax.student.sampling import Sampling
    from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
    from distill_jax.weights import load_params, read_model_config

    compiling: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith(COMPILE_EVENTS):
            compiling.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(note)
    mesh = make_mesh(-1, 1, 1)
    config = read_model_config(directory)
    layout = shardings(mesh, logical_axes(config), abstract_params(config), TRAIN_RULES)
    params = load_params(directory, config, layout)
    engine = Engine(
        config,
        mesh,
        end_id=-1,
        newlines=np.zeros(config.vocab_size, np.uint8),
        sampling=Sampling(temperature=1.0, top_k=50),
        compute_dtype=dtype,
    )
    each = plan_slots(
        engine,
        make_prompts(exam),
        asked=slots,
        num_owed=exam.lengths.size,
        free=free_memory(mesh),
    )

    def take() -> tuple[float, Any]:
        start = time.perf_counter()
        tally = drain(
            sit(
                engine, engine.lay_out(params), exam.common, make_prompts(exam),
                owed=range(len(exam.questions)), slots=each,
            )
        )  # fmt: skip
        return time.perf_counter() - start, tally

    first, tally = take()
    seconds = min(take()[0] for _ in range(repeats))
    rate = matrix_rate(dtype)
    floor = arithmetic(config, exam) / rate
    return {
        "seconds": seconds,
        "tokens_per_second": exam.tokens / seconds,
        "generated_tokens": exam.tokens,
        "prompt_tokens_computed": tally.read + len(exam.common),
        "slots": each * engine.desks,
        "occupancy": tally.occupancy,
        "compile_seconds": sum(compiling),
        "first_seconds": first,
        "matrix_gflop_per_second": rate / 1e9,
        "floor_seconds": floor,
        "floor_tokens_per_second": exam.tokens / floor,
        "share_of_floor": floor / seconds,
    }


def make_prompts(exam: Exam) -> list[Any]:
    """The exam as `sit` is given it: sampled rows with the lengths drawn as their limits."""
    from distill_jax.slots import Prompt, Row

    prompts = [Prompt(index, list(tokens)) for index, tokens in enumerate(exam.questions)]
    for prompt in prompts:
        for place, length in enumerate(exam.lengths[prompt.index], 1):
            key = np.array([prompt.index, place], np.uint32)
            prompt.rows.append(Row(prompt, place, int(length), key))
    return prompts


def drain(exam: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(exam)
        except StopIteration as end:
            return end.value


def matrix_rate(dtype: str) -> float:
    """Operations per second of a large matrix product."""
    import jax
    import jax.numpy as jnp

    size = 2048 if jax.default_backend() == "cpu" else 8192
    matrix = jnp.ones((size, size), dtype)
    product: Callable[..., Any] = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()

    def once() -> float:
        start = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        return time.perf_counter() - start

    return 2 * size**3 / min(once() for _ in range(10))


def arithmetic(config: Any, exam: Exam) -> float:
    """Operations that the exam needs: weights and attention, twice for multiply and add."""
    inner = config.heads * config.head_dim
    keys = config.kv_heads * config.head_dim
    matrices = 2 * inner + 2 * keys + (2 + config.gated_mlp) * config.mlp_width
    weights = config.layers * config.width * matrices
    head = config.width * config.vocab_size

    def looks(start: int, count: np.ndarray | int) -> Any:
        """Tokens that `count` consecutive ones look at, after `start` others."""
        return count * start + count * (count + 1) / 2

    asked = np.array([len(tokens) for tokens in exam.questions])
    read = len(exam.common) + asked.sum()
    seen = looks(0, len(exam.common)) + looks(len(exam.common), asked).sum()
    seen += sum(
        looks(len(exam.common) + before, row).sum()
        for before, row in zip(asked, exam.lengths, strict=True)
    )
    chosen = exam.tokens
    return 2.0 * (weights * (read + chosen) + head * chosen + 2 * config.layers * inner * seen)


def rounded(value: Any) -> Any:
    """Four digits are enough to read."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    typer.run(main)
