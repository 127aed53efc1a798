"""Low-rank adapters out: the two files that peft reads, through a family's table."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from distill_jax.families.arrays import to_host
from distill_jax.families.config_json import find_family
from distill_jax.families.files import read_json, write_json
from distill_jax.families.layout import Placement, find_placements, flatten
from distill_jax.student.lora import ENDING
from distill_jax.student.model import ModelConfig, Params, abstract_params, logical_axes
from distill_jax.weights import check_new

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_adapters(directory: Path, config: ModelConfig, adapters: Params, *, base: Path) -> None:
    """Writes adapters as a directory that peft puts onto the model in `base`.

    Where the family publishes several of our matrices as one, so are their adapters: their ranks
    add up, and so do their alphas, which leaves `alpha / rank` as it is.

    Args:
      directory: Made here, beside and renamed last; must not hold anything yet.
      config: Of the student, adapters included.
      adapters: On any mesh. On several hosts every process calls this, and the first one writes.
      base: The Hugging Face directory of the weights that stayed as they were.

    Raises:
      WeightsError: `directory` holds something.

    Source:
      The layout of peft's checkpoints: https://huggingface.co/docs/peft/developer_guides/checkpoint
    """
    assert config.lora is not None, "there are no adapters"
    check_new(directory)
    family = find_family(read_json(base / "config.json"))
    matrices = [
        place
        for place in find_placements(config.plain, family)
        if place.path + ENDING + ".a" in flatten(abstract_params(config))
    ]
    arrays = _arrays(list(_adapter_placements(config, matrices)), flatten(adapters))
    if jax.process_index():
        return
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write_json(partial / CONFIG, _describe(config, matrices, base=base))
    save_file(arrays, partial / WEIGHTS, metadata={"format": "pt"})
    os.replace(partial, directory)


def _arrays(places: list[Placement], adapters: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """The published arrays; where several adapters are one, it is zero between them."""
    arrays: dict[str, np.ndarray] = {}
    for place in places:
        weight = to_host(adapters[place.path])
        for layer, name in enumerate(place.names):
            array = arrays.setdefault(name, np.zeros(place.shape, np.float32))
            place.write(array, weight[layer])
    return arrays


def _adapter_placements(config: ModelConfig, matrices: list[Placement]) -> Iterator[Placement]:
    """Where `a` and `b` of every matrix stand: [rank, in] and [out, rank], as peft has them."""
    axes_of, shared = flatten(logical_axes(config)), Counter(place.names for place in matrices)
    assert config.lora is not None
    seen: Counter[tuple[str, ...]] = Counter()
    for place in matrices:
        parts = shared[place.names]
        part = f"{seen[place.names]}/{parts}"
        seen[place.names] += 1
        sizes = {**place.sizes, "rank": config.lora.rank, part: parts}
        for half, side in (("a", "lora_A"), ("b", "lora_B")):
            path = f"{place.path}{ENDING}.{half}"
            axes = axes_of[path][1:]
            (matrix_side,) = (group for group in place.groups if set(group) & set(axes))
            rank = (part, "rank")
            yield replace(
                place,
                path=path,
                names=tuple(f"base_model.model.{_module(x)}.{side}.weight" for x in place.names),
                groups=(rank, matrix_side) if half == "a" else (matrix_side, rank),
                sizes=sizes,
                axes=axes,
            )


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _describe(config: ModelConfig, matrices: list[Placement], *, base: Path) -> dict[str, Any]:
    """What `adapter_config.json` says."""
    lora = config.lora
    assert lora is not None
    shared = {
        re.split(r"\.\d+\.", _module(names[0]), maxsplit=1)[1]: count
        for names, count in Counter(place.names for place in matrices).items()
    }
    in_by_out = {place.axes[0] in place.groups[0] for place in matrices}
    assert len(in_by_out) == 1, "a family stores all its matrices alike"
    several = {name: count for name, count in shared.items() if count > 1}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "rank_pattern": {name: count * lora.rank for name, count in several.items()},
        "alpha_pattern": {name: count * lora.alpha for name, count in several.items()},
        "target_modules": sorted(shared),
        "fan_in_fan_out": in_by_out.pop(),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
