"""Prints what training and exams of published models would take of TPU slices.

    distill-jax data prepare gsm8k
    python scripts/scaling.py [--models gptj-6b ...] [--topologies v5e:4x4 ...] [--answers] [--json]

Needs libtpu (`pip install 'distill_jax[tpu]'`) and no TPU. Every chip gets the same rows: the batch
grows with the slice. Rationales are as long as they may be, prompts are counted at 4 bytes a token,
and where a batch does not fit at once it is computed in the largest microbatches that fit. The
second table scales the last topology's programs to other numbers of chips on paper.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROWS = 4
"""Of a batch, for each chip."""

_LLAMA3 = {"vocab_size": 128256, "rope_theta": 500000.0, "rms_norm_eps": 1e-5}
MODELS: dict[str, dict[str, Any]] = {
    "gptj-6b": {
        "model_type": "gptj",
        "n_embd": 4096,
        "n_layer": 28,
        "n_head": 16,
        "rotary_dim": 64,
    },
    "llama3-8b": _LLAMA3
    | {
        "model_type": "llama",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
    },
    "qwen2.5-1.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 1536,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "intermediate_size": 8960,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 1e6,
    },
}
"""The published shapes, as their config.json says them."""

TOPOLOGIES = ("v5e:4x4", "v5p:4x4x4", "v6e:16x16")
CHIPS = (16, 32, 64, 128, 256, 512, 1024)
SLICE = 256  # chips that links join; more are several slices


def compile_one(name: str, topology: str, folder: Path, *, answers: bool) -> dict[str, Any]:
    """The plan of one model on one topology, with what had to be changed for it to fit."""
    from distill_jax.config_file import make_config
    from distill_jax.layouts import choose_layout
    from distill_jax.plan.fit import compile_programs, plan_student
    from distill_jax.plan.memory import count_memory
    from distill_jax.plan.page import compiled_json
    from distill_jax.plan.topology import count_chips, find_topology

    found = find_topology(topology)
    rows = ROWS * count_chips(topology)
    values = {"folder": "-", "task": {"name": "gsm8k"}, "student": {"model": str(folder / name)}}
    small = rows
    while True:
        sizes = [f"train.batch_size={rows}", f"train.microbatch_size={small}"]
        config = make_config(values, sizes)
        student = plan_student(config)
        memory = found.chip.memory
        layout = choose_layout(
            config.mesh, student.model, rows=small, devices=len(found.devices), memory=memory
        )
        counted = count_memory(config, student.model, student.texts, layout.axes)
        if counted.total < 0.9 * memory or small == count_chips(topology):
            break
        small //= 2
    compiled = compile_programs(config, student, topology, answers=answers)
    return {"model": name, "rows": rows, "microbatch": small, **compiled_json(compiled)}


def print_programs(plans: list[dict[str, Any]]) -> None:
    """The first table."""
    print("| model | slice | mesh | rows x microbatches | GB of | TFLOP | GB moved | GB sent "
          "| ms: products, memory, links | tokens/s per chip | of peak |")  # fmt: skip
    print("|" + "---|" * 11)
    for plan in plans:
        step = plan["step"]
        used = (step["held_bytes"] + step["temporary_bytes"]) / 1e9
        sent = sum(each["bytes"] for each in step["exchanges"]) / 1e9
        times = (1e3 * step["seconds"][part] for part in ("products", "memory", "links"))
        speeds, shares = plan["tokens_per_second_per_device"], plan["flops_utilisation"]
        cells = [
            plan["model"],
            plan["name"],
            " x ".join(map(str, plan["axes"])),
            f"{plan['rows']} / {plan['rows'] // plan['microbatch']}",
            f"{used:.1f} of {plan['available_bytes'] / 1e9:.1f}",
            f"{step['flops'] / 1e12:.1f}",
            f"{step['moved_bytes'] / 1e9:.0f}",
            f"{sent:.1f}",
            ", ".join(f"{time:.0f}" for time in times),
            f"{speeds[0]:,.0f} to {speeds[1]:,.0f}",
            f"{shares[0]:.0%} to {shares[1]:.0%}",
        ]
        print("| " + " | ".join(cells) + " |")


def print_answers(plans: list[dict[str, Any]]) -> None:
    """The table of exams."""
    print("| model | slice | answers at a time | GB of | GB moved | ms: products, memory, links "
          "| tokens/s per chip |")  # fmt: skip
    print("|" + "---|" * 7)
    for plan in plans:
        work = plan["answers"]
        used = (work["held_bytes"] + work["temporary_bytes"]) / 1e9
        times = (1e3 * work["seconds"][part] for part in ("products", "memory", "links"))
        speeds = plan["answer_tokens_per_second_per_device"]
        cells = [
            plan["model"],
            plan["name"],
            f"{plan['answer_rows']:,}",
            f"{used:.1f} of {plan['available_bytes'] / 1e9:.1f}",
            f"{work['moved_bytes'] / 1e9:.1f}",
            ", ".join(f"{time:.2f}" for time in times),
            f"{speeds[0]:,.0f} to {speeds[1]:,.0f}",
        ]
        print("| " + " | ".join(cells) + " |")


def scale(plan: dict[str, Any], chips: int) -> dict[str, float]:
    """Milliseconds of a step on so many chips with as many rows each, on paper.

    What a copy of the weights exchanges within itself stays; gradients are added up over as many
    copies as there are, within a slice over links and then, each chip a part of them, over the
    network.
    """
    from distill_jax.chips import CHIPS as KINDS

    step, (data, fsdp, tensor) = plan["step"], plan["axes"]
    chip = KINDS[plan["name"].partition(":")[0]]
    slices = max(1, chips // SLICE)
    copies = chips // (slices * fsdp * tensor)
    links = network = 0.0
    for each in step["exchanges"]:
        if "data" not in each["axes"]:
            links += each["seconds"]
            continue
        whole = data / (data - 1)
        links += each["seconds"] * whole * (copies - 1) / copies
        part = each["bytes"] * whole / copies  # that each chip of a slice has added up
        network += part * (slices - 1) / slices / chip.network
    times = {"products": step["seconds"]["products"], "memory": step["seconds"]["memory"]}
    return {
        name: 1e3 * value for name, value in (times | {"links": links, "network": network}).items()
    }


def print_scaling(plan: dict[str, Any]) -> None:
    """Weak scaling of one model, and where the network becomes the limit."""
    fewest = plan["axes"][1] * plan["axes"][2]
    print(f"{plan['model']}, {plan['name']}, one copy of the weights on {fewest} chips:\n")
    print("| chips | slices | products, ms | memory | links | network | tokens/s, all chips |")
    print("|" + "---|" * 7)
    each = plan["useful_tokens"] / plan["devices"]
    for chips in (count for count in CHIPS if count >= fewest):
        times = scale(plan, chips)
        low, high = (
            chips * each * 1e3 / total for total in (sum(times.values()), max(times.values()))
        )
        cells = [f"{time:.1f}" for time in times.values()]
        slices = max(1, chips // SLICE)
        print(f"| {chips} | {slices} | {' | '.join(cells)} | {low:,.0f} to {high:,.0f} |")
    times = scale(plan, CHIPS[-1])
    other = max(times["products"], times["memory"])
    rows = plan["rows"] / plan["devices"]
    for name, what in (("links", "links in a slice"), ("network", "the network between slices")):
        share = times[name] / other
        print(
            f"\nAt {CHIPS[-1]} chips the time of {what} is {share:.0%} of the time that a chip "
            f"computes: it is the limit below {rows * share:.2g} rows a chip."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--topologies", nargs="+", default=[*TOPOLOGIES])
    parser.add_argument("--answers", action="store_true", help="compile the program of exams too")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    plans = []
    with tempfile.TemporaryDirectory() as folder:
        for name in options.models:
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(MODELS[name]))
            for topology in options.topologies:
                print(f"compiling {name} for {topology}", file=sys.stderr)
                plans.append(compile_one(name, topology, Path(folder), answers=options.answers))
    if options.json:
        print(json.dumps(plans))
        return
    print_programs(plans)
    if options.answers:
        print()
        print_answers(plans)
    for plan in plans:
        if plan["name"] == options.topologies[-1] and plan["axes"][0] > 1:
            print()
            print_scaling(plan)


if __name__ == "__main__":
    main()
