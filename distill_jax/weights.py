"""Published models in and out: Hugging Face directories, through a family's table, no torch."""

import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import httpx2
import huggingface_hub
import jax
import numpy as np
from huggingface_hub import errors as hub

from distill_jax.families.arrays import find_misfits, load, write_arrays
from distill_jax.families.config_json import (
    find_family,
    find_family_for,
    read_config,
    write_config,
)
from distill_jax.families.files import (
    FILES,
    SINGLE,
    TORCH_FILES,
    find_arrays,
    read_json,
    write_json,
)
from distill_jax.families.layout import find_placements, flatten
from distill_jax.families.stored import FLOATS, WeightsError
from distill_jax.families.table import Family
from distill_jax.student.model import ModelConfig, Params, abstract_params
from distill_jax.tokenizer import Tokenizer

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
WANTED = ("config.json", "generation_config.json", *TOKENIZER_FILES)
Written = Literal["float32", "bfloat16"]
"""What exported weights may be."""

WRITTEN: dict[Written, np.dtype] = {"float32": FLOATS["F32"], "bfloat16": FLOATS["BF16"]}

HUB_SECONDS = 5
"""A hub that does not answer in this time can't be reached."""


def find_model(name: str, *, pickled: bool = False) -> Path:
    """The directory of a model, downloaded if `name` is a hub id.

    Args:
      name: A directory, or a Hugging Face hub id such as `openai-community/gpt2`.
      pickled: Downloads `pytorch_model.bin` instead of safetensors.

    Raises:
      WeightsError: there is neither, or the hub can't be reached and no copy was kept here.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or path.exists() or name[0] in ".~" or name.count("/") > 1:
        raise WeightsError(f"{name} is not a directory; give one that holds config.json.")
    wanted = [*WANTED, *(TORCH_FILES if pickled else FILES)]
    try:
        # A download left to itself retries an unreachable hub for most of a minute.
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=wanted))
    except (hub.RepositoryNotFoundError, hub.GatedRepoError, hub.HFValidationError) as error:
        raise WeightsError(
            f"{name} is neither a directory here nor a model on the Hugging Face hub that this "
            f"account may read: {str(error).splitlines()[0]}"
        ) from None
    except (httpx2.HTTPError, hub.OfflineModeIsEnabled) as error:
        reason = str(error).splitlines()[0].rstrip(".")
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except hub.LocalEntryNotFoundError:
        raise WeightsError(
            f"{name} is not a directory here, and the Hugging Face hub can't be reached "
            f"({reason}); give a directory that holds config.json and {SINGLE}."
        ) from None


def read_model_config(directory: Path, *, pickled: bool = False) -> ModelConfig:
    """Reads what a published model is made of.

    A head in the files that differs from the embedding makes the head untied, whatever
    `config.json` says: some published configs are wrong about it. Only then are weights read here.

    Args:
      directory: As `find_model` gives it.
      pickled: The weights lie in `pytorch_model.bin`.

    Raises:
      WeightsError: no readable `config.json`, or a family or a value that is not computed here.
    """
    family, config = _read_config(directory)
    if not config.tied_head:
        return config
    arrays = find_arrays(directory, family, pickled=pickled)
    names = [family.weights[path][0] for path in ("head", "embedding")]
    if any(name not in arrays for name in names):
        return config
    ours, embedding = (arrays[name] for name in names)
    rows = embedding.shape[0]
    same = ours.shape == embedding.shape and all(
        np.array_equal(ours.map()[first:last], embedding.map()[first:last])
        for first, last in itertools.pairwise([*range(0, rows, 1024), rows])
    )
    return replace(config, tied_head=same)


def read_shape(directory: Path) -> ModelConfig:
    """What `config.json` alone says of a model: enough to plan with. Raises as above."""
    return _read_config(directory)[1]


def _read_config(directory: Path) -> tuple[Family, ModelConfig]:
    published = read_json(directory / "config.json")
    try:
        family = find_family(published)
        return family, read_config(family, published)
    except ValueError as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from None


def load_params(
    directory: Path, config: ModelConfig, shardings: Any, *, pickled: bool = False
) -> Params:
    """Reads published weights straight into the devices that keep them.

    Every device's part is read from the file on its own and once; the host holds one published
    array at a time. Half precision becomes float32. Rows that pad the vocabulary are zero.

    Args:
      directory: Holds `model.safetensors`, or an index and the files that it names.
      config: From `read_model_config`.
      shardings: A tree of shardings like `abstract_params`.
      pickled: Reads `pytorch_model.bin`, or what its index names, instead; needs torch.

    Raises:
      WeightsError: arrays are missing, not known or of another shape: one report lists all. Or a
        file is cut short.
    """
    family, _ = _read_config(directory)
    placements = find_placements(config, family)
    arrays = find_arrays(directory, family, pickled=pickled)
    problems = list(find_misfits(placements, family, arrays, tied=config.tied_head))
    if problems:
        report = "\n  ".join(problems)
        raise WeightsError(f"the weights in {directory} do not fit its config:\n  {report}")
    shapes, layouts = flatten(abstract_params(config)), flatten(shardings)
    flat = {
        place.path: load(place, shapes[place.path].shape, arrays, layouts[place.path])
        for place in placements
    }
    paths = jax.tree.map_with_path(
        lambda path, _: ".".join(part.key for part in path), abstract_params(config)
    )
    return jax.tree.map(flat.__getitem__, paths)


def check_new(directory: Path) -> None:
    """Refuses a directory that a model can't be written to.

    Raises:
      WeightsError: `directory` holds something.
    """
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        raise WeightsError(f"{directory} is not empty; name a new directory.")


def save_model(
    directory: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    source: Path | None,
    dtype: Written = "float32",
    card: str = "",
) -> None:
    """Writes a model as a Hugging Face directory, with weights under their published names.

    Written beside and renamed last. On several hosts every process calls this, and the first one
    writes.

    Args:
      directory: Made here; must not hold anything yet.
      config: Of the weights.
      params: On any mesh; gathered one stacked weight at a time.
      tokenizer: Written where there is no source.
      source: The directory that the model was read from, whose config, tokenizer and generation
        config are carried over; None for a model of our own.
      dtype: Of the weights written, each rounded to nearest; `config.json` says it too. float32
        loses nothing.
      card: The text of `README.md`; "" writes none.

    Raises:
      WeightsError: `directory` holds something.
    """
    check_new(directory)
    published = read_json(source / "config.json") if source else {}
    family = find_family(published) if source else find_family_for(config)
    partial = directory.with_name(directory.name + ".partial")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    placements = find_placements(config, family)
    write_arrays(partial, placements, params, dtype=WRITTEN[dtype], writes=writes)
    if not writes:
        return
    special = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    said = write_config(family, config, published) | {"dtype": dtype}
    if source:
        write_json(partial / "config.json", said)
        for name in ("generation_config.json", *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
    else:
        write_json(partial / "config.json", said | special)
        tokenizer.save(partial)
    if not (partial / "generation_config.json").is_file():
        write_json(partial / "generation_config.json", special)
    if card:
        (partial / "README.md").write_text(card)
    os.replace(partial, directory)
