"""Published question sets as TFDS builders: array_record files, written once, in file order.

TensorFlow is not needed. `raw/` in the data folder keeps the files that a set was made from.
"""

import contextlib
import dataclasses
import fcntl
import io
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, cast

import tensorflow_datasets as tfds

from distill_jax.questions.published import SETS, read_chilled, read_published
from distill_jax.questions.raw_files import (
    QuestionsError,
    check_folder,
    fetch_file,
    find_file,
    write_file,
)
from distill_jax.records import Question, from_json, to_json

CHILLED = "chilled"
PREPARE = "distill-jax data prepare"


@dataclasses.dataclass(eq=False)
class SetConfig(tfds.core.BuilderConfig):
    """One question set in one split; sets that come split go by `ho2023` as well."""

    task: str = ""
    split: str = ""

    @property
    def raw_names(self) -> dict[str, str]:
        """File names by source split, as they lie in the raw folder."""
        if self.split == CHILLED:
            return {split: f"{split}.json" for split in ("train", "test")}
        return {source: file.name for source, file in SETS[self.task].files.items()}


def _configs() -> Iterator[SetConfig]:
    for task, published in SETS.items():
        licence = f"Licence: {published.licence}."
        if published.parse_chilled is None:
            yield SetConfig(name=task, description=licence, task=task, split="ho2023")
        else:
            for split in ("ho2023", CHILLED):
                yield SetConfig(name=f"{task}_{split}", description=licence, task=task, split=split)


class PublishedQuestions(tfds.core.GeneratorBasedBuilder):
    """GSM8K, MultiArith, SVAMP, CSQA and StrategyQA; an example is a `Question`."""

    VERSION = tfds.core.Version("1.1.0")  # raise it when a raw row becomes a different question
    RELEASE_NOTES: ClassVar = {
        "1.0.0": "First version.",
        "1.1.0": "strategyqa/550, which the teacher is shown, is no test question.",
    }
    MANUAL_DOWNLOAD_INSTRUCTIONS = f"The raw files; `{PREPARE}` finds or downloads them."
    BUILDER_CONFIGS: ClassVar = list(_configs())

    def _info(self) -> tfds.core.DatasetInfo:
        features = {field.name: tfds.features.Text() for field in dataclasses.fields(Question)}
        choices = tfds.features.Sequence(tfds.features.Text())
        return tfds.core.DatasetInfo(
            builder=self,
            features=tfds.features.FeaturesDict(features | {"choices": choices}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        config = self.set_config
        files = {
            split: Path(dl_manager.manual_dir) / name for split, name in config.raw_names.items()
        }
        read = read_chilled if config.split == CHILLED else read_published
        return {
            split: self._generate_examples(questions)
            for split, questions in read(config.task, files).items()
        }

    @property
    def set_config(self) -> SetConfig:
        """Which set in which split this builder makes."""
        assert isinstance(self.builder_config, SetConfig)
        return self.builder_config

    def _generate_examples(self, questions: list[Question]) -> Iterator[tuple[int, dict]]:
        for i, question in enumerate(questions):
            yield i, to_json(question)


def prepare(name: str, *, split: str, data_dir: Path, source: Path | None) -> dict[str, int]:
    """See `distill_jax.questions.prepare`."""
    builder = _builder(name, split, data_dir)
    config = builder.set_config
    raw = data_dir / "raw" / config.name
    with _locked(data_dir):
        prepared = builder.data_path.exists()  # TFDS writes beside and renames
        if source is not None and prepared:
            _check_same(builder, raw, _find_contents(config, source))
        elif not prepared:
            contents = _find_contents(config, source) if source else _fetch_contents(config, raw)
            for file_name, content in contents.items():
                write_file(raw / file_name, content)
            _build(builder, raw)
    splits = _builder(name, split, data_dir).info.splits
    return {key: splits[key].num_examples for key in ("train", "test", "left_out") if key in splits}


def read_prepared(name: str, *, split: str, data_dir: Path) -> list[Question]:
    """The train, then the test questions of a set; prepares it first if need be."""
    if not _builder(name, split, data_dir).data_path.exists():
        prepare(name, split=split, data_dir=data_dir, source=None)
    builder = _builder(name, split, data_dir)
    sources = cast(dict[str, Any], builder.as_data_source())
    rows = [row for part in ("train", "test") for row in _all_rows(sources[part])]
    return [_question(row) for row in rows]


def _all_rows(source: Any) -> list[Mapping]:
    return source.__getitems__(list(range(len(source))))  # one batch: half the time of a loop


def _question(row: Mapping) -> Question:
    choices = [choice.decode() for choice in row["choices"]]
    texts = {key: value.decode() for key, value in row.items() if key != "choices"}
    return from_json(Question, texts | {"choices": choices})


def _builder(name: str, split: str, data_dir: Path) -> PublishedQuestions:
    configs = {(config.task, config.split): config for config in PublishedQuestions.BUILDER_CONFIGS}
    if (name, split) not in configs:
        known = ", ".join(f"{task} ({split})" for task, split in configs)
        raise QuestionsError(f"the published question sets are {known}; got {name} ({split}).")
    return PublishedQuestions(
        config=configs[name, split].name, data_dir=str(data_dir), file_format="array_record"
    )


def _build(builder: PublishedQuestions, raw: Path) -> None:
    config = tfds.download.DownloadConfig(manual_dir=str(raw), try_download_gcs=False)
    tfds.disable_progress_bar()
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # it warns that the set is not there yet
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
            builder.download_and_prepare(download_config=config)
    finally:
        absl.setLevel(level)


def _fetch_contents(config: SetConfig, raw: Path) -> dict[str, bytes]:
    if config.split == CHILLED:
        raise QuestionsError(
            f"the chilled split of {config.task} is not downloaded but read from files of yours: "
            f"`{PREPARE} {config.task} --split chilled --from DIR`."
        )
    try:
        return {
            file.name: fetch_file(file, kept=raw / file.name)
            for file in SETS[config.task].files.values()
        }
    except QuestionsError as error:
        raise QuestionsError(
            f"{error} With the raw files on this machine: `{PREPARE} {config.task} --from DIR`."
        ) from error


def _find_contents(config: SetConfig, source: Path) -> dict[str, bytes]:
    if config.split != CHILLED:
        return {file.name: find_file(file, source) for file in SETS[config.task].files.values()}
    check_folder(source)
    folders = (source, source / config.task)
    contents = {}
    for split, name in config.raw_names.items():
        paths = [folder / f"{split}{end}" for folder in folders for end in (".json", ".jsonl")]
        found = [path for path in paths if path.is_file()]
        if not found:
            raise QuestionsError(
                f"the chilled split of {config.task} is read from train.json and test.json (or "
                f".jsonl) in {source} or {source / config.task}; there is no {split} file."
            )
        contents[name] = found[0].read_bytes()
    return contents


def _check_same(builder: PublishedQuestions, raw: Path, contents: Mapping[str, bytes]) -> None:
    """Refuses to take a set made from other files for one made from these."""
    config = builder.set_config
    for name, content in contents.items():
        kept = raw / name
        if kept.is_file() and kept.read_bytes() != content:
            raise QuestionsError(
                f"{config.task} ({config.split}) is already prepared from another {name}: delete "
                f"{builder.data_path} first, or name another data folder."
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time prepare sets in a folder; a process that dies lets go."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
