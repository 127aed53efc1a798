"""Shows what loading a model of about 1 GB costs: bytes read, and memory above the device arrays.

    python scripts/load_memory.py [--devices 1] [--dtype float32] [--json]

A random model with the names and the fused projections of Pythia is written to a temporary folder
and loaded by a process of its own on fake CPU devices. Device arrays lie in host memory there, so
they are subtracted from the peak. Memory is all that the kernel calls resident, mapped files
included (`VmHWM`, Linux only). A small model is loaded first: what JAX itself takes is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

MB = 1e6
LARGE, SMALL = (1024, 12, 50304), (64, 2, 512)  # width, layers, vocabulary
HEAD_DIM = 64


def write_model(directory: Path, sizes: tuple[int, int, int], dtype: Any) -> None:
    """Writes a random model of the Pythia family."""
    import jax

    from distill_jax.scratch import make_tokenizer
    from distill_jax.student.model import ModelConfig, abstract_params, init_params, logical_axes
    from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
    from distill_jax.tokenizer import Tokenizer
    from distill_jax.weights import save_model

    width, layers, vocab_size = sizes
    config = ModelConfig(
        vocab_size=vocab_size,
        width=width,
        layers=layers,
        heads=width // HEAD_DIM,
        kv_heads=width // HEAD_DIM,
        head_dim=HEAD_DIM,
        mlp_width=4 * width,
        max_positions=2048,
        norm="layer",
        parallel=True,
        activation="gelu",
        gated_mlp=False,
        rotary_dims=HEAD_DIM // 4,
        attention_bias=True,
        out_bias=True,
        mlp_bias=True,
    )
    layout = shardings(
        make_mesh(1, 1, 1), logical_axes(config), abstract_params(config), TRAIN_RULES
    )
    params = init_params(config, jax.random.key(0), layout)
    tokenizer = Tokenizer(make_tokenizer())
    save_model(directory, config, params, tokenizer, source=None, dtype=dtype)


def load_model(directory: Path) -> Any:
    """Loads a model over all devices, its width and its heads spread as in training."""
    import jax

    from distill_jax.student.model import abstract_params, logical_axes
    from distill_jax.student.sharding import TRAIN_RULES, make_mesh, shardings
    from distill_jax.weights import load_params, read_model_config

    config = read_model_config(directory)
    tensor = 2 if jax.device_count() > 2 else 1
    mesh = make_mesh(1, -1, tensor)
    layout = shardings(mesh, logical_axes(config), abstract_params(config), TRAIN_RULES)
    return jax.block_until_ready(load_params(directory, config, layout))


def measure(small: Path, large: Path) -> dict[str, float]:
    """Loads both models and compares the second one's cost with its size."""
    import jax
    import numpy as np

    from distill_jax.families.config_json import find_family
    from distill_jax.families.files import find_arrays, read_json
    from distill_jax.families.layout import Placement

    load_model(small)
    copied, view = [0], Placement.view

    def count(place: Placement, array: np.ndarray, wanted: Any) -> np.ndarray:
        seen = view(place, array, wanted)
        copied[0] += seen.nbytes
        return seen

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = read_memory("VmRSS")
    with mock.patch.object(Placement, "view", count):
        params = load_model(large)
    peak = read_memory("VmHWM") - before
    family = find_family(read_json(large / "config.json"))
    arrays = [stored.map() for stored in find_arrays(large, family).values()]
    held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
    return {
        "file_mb": sum(array.nbytes for array in arrays) / MB,
        "read_mb": copied[0] / MB,
        "device_arrays_mb": held / MB,
        "host_peak_above_them_mb": (peak - held) / MB,
        "largest_tensor_mb": max(4 * array.size for array in arrays) / MB,
    }


def read_memory(field: str) -> int:
    """Bytes that the kernel says of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--devices", type=int, default=1, help="fake devices to spread it over")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--json", action="store_true", help="print one JSON object only")
    parser.add_argument("--measure", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
        return
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={options.devices}"
    with tempfile.TemporaryDirectory() as folder:
        small, large = Path(folder) / "small", Path(folder) / "large"
        write_model(small, SMALL, options.dtype)
        write_model(large, LARGE, options.dtype)
        words = [sys.executable, __file__, "--measure", str(small), str(large)]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    result = {"devices": options.devices, "dtype": options.dtype, **json.loads(done.stdout)}
    if options.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:>24}: {value:,.1f}" if isinstance(value, float) else f"{name:>24}: {value}")


if __name__ == "__main__":
    main()
