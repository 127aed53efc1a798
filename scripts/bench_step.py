"""Times the training step beside the original's in PyTorch: same weights, same tokens, one run.

    python scripts/bench_step.py                     # 6 layers x 512, the shapes of DESIGN's table
    python scripts/bench_step.py --prefix-gradient   # the triplet loss reaches into the prompt

Both sides take turns, with the same threads and AdamW; the figures are medians over steps of a
round of 60, for which our batches get the few shapes that `run` would choose. The original pads
each batch to its own longest texts. The floor is the arithmetic of our step over the rate of a
large matrix product measured in the same run; the ratio of `flops` is that of both sides' products
in the first step. Peak memory is that of a process of its own for each side: what it held at most
above what it held before the first step (on accelerators, what the allocator says).
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from load_memory import read_memory

ROUND = 60  # batches


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is trained on what. Lengths are means; their spread is that of GSM8K's texts."""

    family: str
    layers: int
    width: int
    heads: int
    vocab: int
    batch: int
    demonstrations: int
    question: int
    rationale: int
    dtype: str
    prefix_gradient: bool
    remat: Any


def main(
    layers: int = 6,
    width: int = 512,
    heads: int = 8,
    vocab: int = 16_384,
    batch: int = 8,
    demonstrations: int = 330,
    question: int = 60,
    rationale: int = 110,
    dtype: str = "float32",
    family: Annotated[str, typer.Option(help="gpt2, gptj or llama")] = "gpt2",
    prefix_gradient: bool = False,
    remat: Annotated[str, typer.Option(help="of our step: none, dots or full")] = "dots",
    steps: int = 7,
    memory: Annotated[bool, typer.Option(help="measure peak memory, each side alone")] = True,
    side: Annotated[str, typer.Option(help="pytorch, ours or both")] = "both",
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Prints seconds per step of both sides, their ratio, tokens, memory and the floor."""
    shape = Shape(
        family, layers, width, heads, vocab, batch, demonstrations, question, rationale, dtype,
        prefix_gradient, remat,
    )  # fmt: skip
    if side != "both":
        print(json.dumps(measure_alone(shape, side, steps)))
        return
    figures = compare(shape, steps)
    if memory:
        for name in ("pytorch", "ours"):
            figures[name]["peak_bytes"] = run_alone(name)["peak_bytes"]
        ours, theirs = figures["ours"]["peak_bytes"], figures["pytorch"]["peak_bytes"]
        figures["ratio"]["peak_bytes"] = round(theirs / ours, 2)
    print(json.dumps(figures, indent=None if as_json else 2))


def make_samples(shape: Shape) -> list[list[Any]]:
    """The samples of a round's steps: random tokens of lengths that spread like real ones."""
    from pytorch_baseline import Sample

    rng = np.random.default_rng(0)

    def text(mean: int, spread: float) -> list[int]:
        length = int(rng.lognormal(np.log(mean) - spread**2 / 2, spread))
        return rng.integers(3, shape.vocab, max(length, 2)).tolist()

    beginning = rng.integers(3, shape.vocab, shape.demonstrations).tolist()
    return [
        [
            Sample([*beginning, *text(shape.question, 0.33)],
                   *(text(shape.rationale, 0.317) for _ in range(3)))
            for _ in range(shape.batch)
        ]
        for _ in range(ROUND)
    ]  # fmt: skip


def make_config(shape: Shape) -> Any:
    """The student of a shape, as its family's published config would say it."""
    from distill_jax.families import FAMILIES
    from distill_jax.families.config_json import read_config

    gpt = {
        "n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads,
        "n_positions": 2048, "vocab_size": shape.vocab,
    }  # fmt: skip
    published: dict[str, tuple[str, dict[str, int]]] = {
        "gpt2": ("GPT2LMHeadModel", gpt),
        "gptj": ("GPTJForCausalLM", gpt | {"rotary_dim": 64}),
        "llama": ("LlamaForCausalLM", {
            "hidden_size": shape.width, "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads, "intermediate_size": 8 * shape.width // 3,
            "vocab_size": shape.vocab, "max_position_embeddings": 2048,
        }),
    }  # fmt: skip
    architecture, values = published[shape.family]
    return read_config(FAMILIES[architecture], values)


def make_params(shape: Shape) -> Any:
    import jax

    from distill_jax.student.model import abstract_params, init_params, logical_axes
    from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings

    config = make_config(shape)
    layout = shardings(
        make_mesh(1, 1, 1), logical_axes(config), abstract_params(config), TRAIN_RULES
    )
    return init_params(config, jax.random.key(0), layout)


def ours(shape: Shape, samples: list[list[Any]]) -> tuple[Callable[[int], dict], dict[str, Any]]:
    """A function that takes our step `index`, and what is known beforehand.

    The first step of every shape compiles: `programs` names these steps.
    """
    import jax
    import jax.numpy as jnp

    from distill_jax.packing import Item, make_grid, pack, plan_shapes
    from distill_jax.student.flops import step_flops
    from distill_jax.student.objective import Objective
    from distill_jax.student.sharding import make_mesh
    from distill_jax.student.step import (
        init_state,
        make_optimizer,
        make_step,
        put_batch,
        warmup_schedule,
    )

    mesh, shared = make_mesh(1, 1, 1), tuple(samples[0][0].prompt[: shape.demonstrations - 1])
    optimizer = make_optimizer(warmup_schedule(1e-5, 0), 0.01)
    objective = Objective(prefix_gradient=shape.prefix_gradient)
    state, layout = init_state(make_params(shape), optimizer, mesh)
    step = make_step(
        make_config(shape), optimizer, objective,
        mesh=mesh, state_shardings=layout, compute_dtype=jnp.dtype(shape.dtype), remat=shape.remat,
    )  # fmt: skip
    items = [
        [Item(tuple(s.prompt[len(shared):]), *map(tuple, (s.anchor, s.positive, s.negative)))
         for s in part]
        for part in samples
    ]  # fmt: skip
    grid = make_grid(shape.batch, microbatches=1, shards=1)
    shapes = plan_shapes(items, grid, objective)
    batches = [pack(part, grid, shapes, shared=shared, objective=objective) for part in items]
    sizes = [tuple(x.shape for x in jax.tree.leaves(batch)) for batch in batches]
    holder = [state]

    def take(index: int) -> dict:
        holder[0], figures = step(holder[0], put_batch(batches[index], mesh))
        return jax.device_get(figures)

    computed = statistics.mean(batch.tokens.size for batch in batches)
    useful = statistics.mean(float(batch.counts.useful) for batch in batches)
    return take, {
        "computed_tokens": round(computed),
        "useful_share": round(useful / computed, 3),
        "programs": sorted({sizes.index(size) for size in sizes}),
        "flops": [step_flops(make_config(shape), batch.counts, objective) for batch in batches],
    }


def theirs(shape: Shape, samples: list[list[Any]]) -> tuple[Callable[[int], dict], dict[str, Any]]:
    """A function that takes the original's step `index`, and what is known beforehand."""
    import torch
    from pytorch_baseline import original_losses
    from transformers import AutoModelForCausalLM

    from distill_jax.scratch import make_tokenizer
    from distill_jax.tokenizer import Tokenizer
    from distill_jax.weights import save_model

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = Tokenizer(make_tokenizer())
        save_model(Path(folder), make_config(shape), make_params(shape), tokenizer, source=None)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)
    half = shape.dtype == "bfloat16"

    def take(index: int) -> dict:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            lm, triplet = original_losses(
                model, samples[index], prompt_weight=0.1, margin=1.0, prefix_gradient=False
            )
        (lm + 0.5 * triplet).backward()
        optimizer.step()
        return {"lm_loss": lm.item(), "reflection_loss": triplet.item()}

    return take, {}


SIDES = {"pytorch": theirs, "ours": ours}


def compare(shape: Shape, steps: int) -> dict[str, Any]:
    """Both sides in turn, once our programs are compiled and the first step's losses compared."""
    samples = make_samples(shape)
    takes, facts = {}, {}
    for name, make in SIDES.items():
        takes[name], facts[name] = make(shape, samples)
    programs, flops = (facts["ours"].pop(name) for name in ("programs", "flops"))
    first = {"ours": takes["ours"](0)}
    first["pytorch"], their_flops = count_flops(takes["pytorch"])
    error = max(
        abs(float(first["ours"][k]) / first["pytorch"][k] - 1)
        for k in ("lm_loss", "reflection_loss")
    )
    for index in programs[1:]:
        takes["ours"](index)
    seconds: dict[str, list[float]] = {name: [] for name in SIDES}
    for index in range(1, steps + 1):
        for name, take in takes.items():
            begin = time.perf_counter()
            take(index)
            seconds[name].append(time.perf_counter() - begin)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    pairs = zip(seconds["pytorch"], seconds["ours"], strict=True)
    rate = matmul_rate(shape.dtype)
    return {
        "shape": dataclasses.asdict(shape),
        "pytorch": {"seconds_per_step": round(medians["pytorch"], 3)} | facts["pytorch"],
        "ours": {"seconds_per_step": round(medians["ours"], 3)} | facts["ours"],
        "ratio": {
            "seconds_per_step": round(statistics.median(x / y for x, y in pairs), 2),
            "flops": round(their_flops / flops[0], 2),
        },
        "floor_seconds": round(statistics.median(flops[1 : steps + 1]) / rate, 3),
        "matmul_flops_per_second": round(rate),
        "first_step_relative_loss_error": error,
    }


def count_flops(take: Callable[[int], dict]) -> tuple[dict, int]:
    """PyTorch's first step, and the operations of its products; ours are counted likewise."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        figures = take(0)
    return figures, counter.get_total_flops()


def matmul_rate(dtype: str) -> float:
    """Operations per second of a large matrix product, the best of ten."""
    import jax
    import jax.numpy as jnp

    size = 4096 if jax.default_backend() == "gpu" else 2048
    x = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda x: x @ x)
    best = float("inf")
    for _ in range(10):
        begin = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def measure_alone(shape: Shape, side: str, steps: int) -> dict[str, Any]:
    """Peak memory of one side, in this process."""
    take, _ = SIDES[side](shape, make_samples(shape))
    Path("/proc/self/clear_refs").write_text("5")  # the process's peak begins anew
    held, _ = memory(side)
    for index in range(steps):
        take(index)
    return {"peak_bytes": memory(side)[1] - held}


def memory(side: str) -> tuple[int, int]:
    """Bytes held now, and at most: what an accelerator's allocator says, or of this process."""
    import jax
    import torch

    if side == "pytorch" and torch.cuda.is_available():
        return torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    stats = jax.local_devices()[0].memory_stats() if side == "ours" else None
    if stats:
        return stats["bytes_in_use"], stats["peak_bytes_in_use"]
    # `ru_maxrss` would be no less than that of the process which started this one.
    return read_memory("VmRSS"), read_memory("VmHWM")


def run_alone(side: str) -> dict[str, Any]:
    """`measure_alone` in a process of its own, with this one's arguments."""
    command = [sys.executable, *sys.argv, "--side", side, "--steps", "1"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    typer.run(main)
