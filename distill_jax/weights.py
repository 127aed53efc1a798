"""Published models in and out: Hugging Face directories, through a family's table, no torch."""

import contextlib
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import huggingface_hub
import jax
import numpy as np
from huggingface_hub import errors as hub

from distill_jax.families.arrays import (
    INDEX,
    SINGLE,
    WeightsError,
    find_misfits,
    load,
    open_arrays,
    read_json,
    write_arrays,
    write_json,
)
from distill_jax.families.config_json import (
    find_family,
    find_family_for,
    read_config,
    write_config,
)
from distill_jax.families.layout import find_placements, flatten
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
WANTED = ["config.json", "generation_config.json", "*.safetensors", INDEX, *TOKENIZER_FILES]
HUB_SECONDS = 5
"""A hub that does not answer in this time can't be reached."""


def find_model(name: str) -> Path:
    """The directory of a model, downloaded if `name` is a hub id.

    Args:
      name: A directory, or a Hugging Face hub id such as `openai-community/gpt2`.

    Raises:
      WeightsError: there is neither, or the hub can't be reached and no copy was kept here.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or path.exists() or name[0] in ".~" or name.count("/") > 1:
        raise WeightsError(f"{name} is not a directory; give one that holds config.json.")
    try:
        # A download left to itself retries an unreachable hub for most of a minute.
        huggingface_hub.HfApi().model_info(name, timeout=HUB_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=WANTED))
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


def read_model_config(directory: Path) -> ModelConfig:
    """Reads what a published model is made of.

    A head in the files that differs from the embedding makes the head untied, whatever
    `config.json` says: some published configs are wrong about it.

    Raises:
      WeightsError: no readable `config.json`, or a family or a value that is not computed here.
    """
    family, config = _read_config(directory)
    if not config.tied_head:
        return config
    with contextlib.ExitStack() as stack:
        sources = open_arrays(directory, family, stack)
        names = [family.weights[path][0] for path in ("head", "embedding")]
        if any(name not in sources for name in names):
            return config
        ours, embedding = (sources[name] for name in names)
        rows = embedding.get_shape()[0]
        same = ours.get_shape() == embedding.get_shape() and all(
            np.array_equal(ours[first:last], embedding[first:last])
            for first, last in itertools.pairwise([*range(0, rows, 1024), rows])
        )
    return replace(config, tied_head=same)


def _read_config(directory: Path) -> tuple[Family, ModelConfig]:
    published = read_json(directory / "config.json")
    try:
        family = find_family(published)
        return family, read_config(family, published)
    except ValueError as error:
        raise WeightsError(f"{directory / 'config.json'}: {error}") from None


def load_params(directory: Path, config: ModelConfig, shardings: Any) -> Params:
    """Reads published weights straight into the devices that keep them.

    Every device's part is read from the file on its own; the host holds one stacked weight at a
    time. Half precision becomes float32. Rows that pad the vocabulary are zero.

    Args:
      directory: Holds `model.safetensors`, or an index and the files that it names.
      config: From `read_model_config`.
      shardings: A tree of shardings like `abstract_params`.

    Raises:
      WeightsError: arrays are missing, not known or of another shape: one report lists all. Or a
        file is cut short.
    """
    family, _ = _read_config(directory)
    placements = find_placements(config, family)
    with contextlib.ExitStack() as stack:
        sources = open_arrays(directory, family, stack)
        problems = list(find_misfits(placements, family, sources, tied=config.tied_head))
        if problems:
            report = "\n  ".join(problems)
            raise WeightsError(f"the weights in {directory} do not fit its config:\n  {report}")
        shapes, layouts = flatten(abstract_params(config)), flatten(shardings)
        flat = {
            place.path: load(place, shapes[place.path].shape, sources, layouts[place.path])
            for place in placements
        }
    paths = jax.tree.map_with_path(
        lambda path, _: ".".join(part.key for part in path), abstract_params(config)
    )
    return jax.tree.map(flat.__getitem__, paths)


def save_model(
    directory: Path,
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    *,
    source: Path | None,
) -> None:
    """Writes a model as a Hugging Face directory, with float32 weights under published names.

    Written beside and renamed last. On several hosts every process calls this, and the first one
    writes.

    Args:
      directory: Made here; must not hold anything yet.
      config: Of the weights.
      params: On any mesh; gathered one stacked weight at a time.
      tokenizer: Written where there is no source.
      source: The directory that the model was read from, whose config, tokenizer and generation
        config are carried over; None for a model of our own.

    Raises:
      WeightsError: `directory` holds something.
    """
    if directory.is_dir() and any(directory.iterdir()):
        raise WeightsError(f"{directory} is not empty; name a new directory.")
    published = read_json(source / "config.json") if source else {}
    family = find_family(published) if source else find_family_for(config)
    partial = directory.with_name(directory.name + ".partial")
    writes = jax.process_index() == 0
    if writes:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    write_arrays(partial, find_placements(config, family), params, writes=writes)
    if not writes:
        return
    special = {"bos_token_id": tokenizer.begin_id, "eos_token_id": tokenizer.end_id}
    said = write_config(family, config, published)
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
    os.replace(partial, directory)
