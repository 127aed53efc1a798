"""The five published question sets: their files, where those are published, and their splits."""

import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.questions.raw_files import QuestionsError, RawFile
from distill_jax.questions.rows import (
    Item,
    Row,
    parse_chilled_multiarith,
    parse_chilled_strategyqa,
    parse_csqa,
    parse_gsm8k,
    parse_multiarith,
    parse_strategyqa,
    parse_svamp,
)
from distill_jax.records import Kind, Question

GITHUB = "https://raw.githubusercontent.com"
GSM8K = f"{GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c"
ZERO_SHOT_COT = f"{GITHUB}/kojima-takeshi188/zero_shot_cot/main/dataset"  # verbatim copies

BIG_BENCH = "task.json"  # every BIG-bench task has this name; its rows are its `examples`


@dataclass(frozen=True, slots=True)
class PublishedSet:
    """A published question set.

    Attributes:
      licence: What its publisher states.
      kind: How its answers are read.
      files: By source split; the one file of an unsplit set is `all`.
      parse: Reads a row of `files`.
      parse_chilled: Reads a row of the Hugging Face mirror `ChilleD/...`; None if it has none.
      left_out: Rows that are demonstrations of the prompt and would be test questions.
    """

    licence: str
    kind: Kind
    files: Mapping[str, RawFile]
    parse: Callable[[Row], Item]
    parse_chilled: Callable[[Row], Item] | None = None
    left_out: frozenset[int] = frozenset()


def split_rows(num_rows: int) -> tuple[list[int], list[int]]:
    """The split of Ho et al., "Large Language Models Are Reasoning Teachers" (ACL 2023).

    Returns:
      The rows of train (70%) and of test, both ascending.
    """
    order = np.random.RandomState(0).permutation(num_rows).tolist()
    num_train = round(0.7 * num_rows)
    return sorted(order[:num_train]), sorted(order[num_train:])


def read_published(name: str, files: Mapping[str, Path]) -> dict[str, list[Question]]:
    """Reads the raw files of a set: `train`, `test`, and `left_out` where a set leaves rows out."""
    published = SETS[name]
    if "all" not in published.files:
        return _read_splits(name, files, published.parse)
    items = [item for _, item in _read_items(files["all"], published.parse)]
    train, test = split_rows(len(items))
    splits = {
        "train": train,
        "test": [i for i in test if i not in published.left_out],
        "left_out": [i for i in test if i in published.left_out],
    }
    return {
        split: [_question(items[i], f"{name}/{i}", split, published.kind) for i in rows]
        for split, rows in splits.items()
        if rows
    }


def read_chilled(name: str, files: Mapping[str, Path]) -> dict[str, list[Question]]:
    """Reads a set's `train` and `test` files as the `ChilleD/...` mirrors have them.

    Raises:
      QuestionsError: a row is not as the mirror's; the message names file, row and columns.
    """
    parse = SETS[name].parse_chilled
    assert parse is not None, f"{name} has no chilled split"
    return _read_splits(name, files, parse)


def _read_splits(
    name: str, files: Mapping[str, Path], parse: Callable[[Row], Item]
) -> dict[str, list[Question]]:
    return {
        split: [
            _question(item, f"{name}/{split}/{i}", split, SETS[name].kind)
            for i, item in _read_items(files[split], parse)
        ]
        for split in ("train", "test")
    }


def _read_items(path: Path, parse: Callable[[Row], Item]) -> Iterator[tuple[int, Item]]:
    rows = _read_rows(path)
    if not rows:
        raise QuestionsError(f"{path} holds no question.")
    for i, row in enumerate(rows):
        try:
            yield i, parse(row)
        except KeyError as error:
            raise QuestionsError(f"{path}, row {i} has no {error}; got {_short(row)}.") from error
        except (ArithmeticError, AttributeError, TypeError, ValueError) as error:
            raise QuestionsError(
                f"{path}, row {i} can't be read ({error}); got {_short(row)}."
            ) from error


def _read_rows(path: Path) -> list[Any]:
    """The rows of a BIG-bench task, of a JSON array, or of JSON lines."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == BIG_BENCH:
            return json.loads(text)["examples"]
        if text.lstrip().startswith("["):
            return json.loads(text)
        # not splitlines: it also splits at characters that JSON allows inside a text
        return [json.loads(line) for line in text.split("\n") if line.strip()]
    except ValueError as error:
        raise QuestionsError(f"{path} is neither a JSON array nor JSON lines: {error}.") from error


def _short(row: Any) -> str:
    return textwrap.shorten(json.dumps(row, ensure_ascii=False), 200)


def _question(item: Item, id: str, split: str, kind: Kind) -> Question:
    return Question(
        id=id,
        text=item.text,
        answer=item.answer,
        split="train" if split == "train" else "test",
        kind=kind,
        choices=item.choices,
        solution=item.solution,
        group=item.group,
    )


SETS: dict[str, PublishedSet] = {
    "gsm8k": PublishedSet(
        licence="MIT",
        kind="numeric",
        files={
            "train": RawFile(
                "train.jsonl",
                f"{GSM8K}/grade_school_math/data/train.jsonl",
                "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
            ),
            "test": RawFile(
                "test.jsonl",
                f"{GSM8K}/grade_school_math/data/test.jsonl",
                "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
            ),
        },
        parse=parse_gsm8k,
    ),
    "multiarith": PublishedSet(
        licence="none stated",
        kind="numeric",
        files={
            "all": RawFile(
                "MultiArith.json",
                f"{ZERO_SHOT_COT}/MultiArith/MultiArith.json",
                "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
            )
        },
        parse=parse_multiarith,
        parse_chilled=parse_chilled_multiarith,
    ),
    "svamp": PublishedSet(
        licence="MIT",
        kind="numeric",
        files={
            "all": RawFile(
                "SVAMP.json",
                f"{ZERO_SHOT_COT}/SVAMP/SVAMP.json",
                "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
            )
        },
        parse=parse_svamp,
        parse_chilled=parse_svamp,
    ),
    "csqa": PublishedSet(
        licence="MIT",
        kind="choice",
        files={
            "train": RawFile(
                "train_rand_split.jsonl",
                "https://s3.amazonaws.com/commonsensqa/train_rand_split.jsonl",
                "58ffa3c8472410e24b8c43f423d89c8a003d8284698a6ed7874355dedd09a2fb",
            ),
            # the labels of the published test file are hidden: its dev file is the test split
            "test": RawFile(
                "dev_rand_split.jsonl",
                "https://s3.amazonaws.com/commonsensqa/dev_rand_split.jsonl",
                "3210497fdaae614ac085d9eb873dd7f4d49b6f965a93adadc803e1229fd8a02a",
            ),
        },
        parse=parse_csqa,
    ),
    "strategyqa": PublishedSet(
        licence="MIT; this form of it: BIG-bench, Apache-2.0",
        kind="yes_no",
        files={
            "all": RawFile(
                BIG_BENCH,
                f"{ZERO_SHOT_COT}/StrategyQA/task.json",
                "60af9081fed20102fd8bb1e02dc7d9f12238efcba33e4c1a56b4d61cb6409803",
            )
        },
        parse=parse_strategyqa,
        parse_chilled=parse_chilled_strategyqa,
        left_out=frozenset({369, 550}),
    ),
}
