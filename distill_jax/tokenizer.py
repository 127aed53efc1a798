"""Text to token ids and back: where a text begins and ends, and where a prompt meets its target."""

import functools
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import transformers
from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

_ANCHORS = (":", "x", "0")
_PLACEHOLDER = re.compile(r"<\|extratoken_\d+\|>")  # GPT-J names the rows that pad its embedding

OLDER_FILES = ("vocab.json", "tokenizer.model", "spiece.model")
"""What older directories hold instead of `tokenizer.json`."""

T5_CLASSES = ("T5Tokenizer", "T5TokenizerFast")

TOGETHER = 512
"""Texts that are tokenised in one call."""

BEGINS, ENDS, BLANK = 1, 2, 4
"""Bits of `Tokenizer.newlines`."""


class Tokenizer:
    """A published tokenizer, with special tokens only where this class puts them.

    Attributes:
      num_tokens: Ids below this mean something; a model may have more rows.
      begin_id: The id that begins a text, whether or not prompts carry it; None if there is none.
      end_id: The id that ends a text, or None where the model has none.
    """

    def __init__(self, published: PreTrainedTokenizerFast, *, ends_prompts: bool = False):
        """Wraps a tokenizer; `ends_prompts` puts the end token behind them, as encoders read it."""
        self._published = published
        anchors = ((text, self._encode(text)) for text in _ANCHORS)
        self._anchors = [(text, ids, self._raw_decode(ids)) for text, ids in anchors]
        text, ids, _ = self._anchors[0]
        whole = list(published(text, split_special_tokens=True)["input_ids"])
        start = next(i for i in range(len(whole)) if whole[i : i + len(ids)] == ids)
        self._begin = whole[:start]  # some families also end a text; a prompt is never at its end
        self.begin_id = self._begin[0] if self._begin else self._id_of(published.bos_token)
        self.end_id = self._id_of(published.eos_token)
        self._prompt_end = [self.end_id] if ends_prompts and self.end_id is not None else []
        self._found: dict[str, int | None] = {}
        self.num_tokens = len(published)
        while _PLACEHOLDER.fullmatch(str(published.convert_ids_to_tokens(self.num_tokens - 1))):
            self.num_tokens -= 1

    @functools.cached_property
    def newlines(self) -> np.ndarray:
        r"""Where each token's text has newlines, uint8 of shape [num_tokens].

        A sum of bits: 1 (`BEGINS`) if it begins with "\n", 2 (`ENDS`) if it ends with "\n", 4
        (`BLANK`) if "\n\n" is inside.
        """
        _, anchor, before = self._anchors[0]
        rows = [[*anchor, i] for i in range(self.num_tokens)]
        texts = self._published.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)
        bits = [
            BEGINS * text.startswith("\n") + ENDS * text.endswith("\n") + BLANK * ("\n\n" in text)
            for text in (text[len(before) :] for text in texts)
        ]
        return np.array(bits, np.uint8)

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text from its beginning.

        A beginning token stands exactly where the published tokenizer puts one; what looks like a
        special token in `text` is text.
        """
        (ids,) = self.encode_prompts([text])
        return ids

    def encode_prompts(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The same for many texts, some of them at a time: that is several times as quick."""
        for some in pieces(texts):
            for ids in self._encode_all(some):
                yield [*self._begin, *ids, *self._prompt_end]

    def encode_target(self, prompt: str, target: str) -> list[int]:
        """The ids that follow those of `prompt`, with the end token if there is one.

        Where tokens would run across the boundary, the prompt keeps the ids that it has at exam
        time and the target is split on its own, as text in mid-line.
        """
        (ids,) = self.encode_targets([prompt], [self.encode_prompt(prompt)], [target])
        return ids

    def encode_targets(
        self, prompts: Sequence[str], heads: Iterable[Sequence[int]], targets: Sequence[str]
    ) -> Iterator[list[int]]:
        """The same for many prompts, whose ids are in `heads`, with a target each."""
        end = [] if self.end_id is None else [self.end_id]
        joints = self._encode_all(list(map(str.__add__, prompts, targets)))
        for head, joint, target in zip(heads, joints, targets, strict=True):
            before = list(head[len(self._begin) : len(head) - len(self._prompt_end)])
            fits = joint[: len(before)] == before
            yield [*(joint[len(before) :] if fits else self._continue(target)), *end]

    def decode(self, ids: Sequence[int]) -> str:
        """The text that `ids` add to the text before them; special tokens add none."""
        _, anchor, before = self._anchors[0]
        return self._raw_decode([*anchor, *(int(i) for i in ids)])[len(before) :]

    def find_token(self, text: str) -> int | None:
        """The one token that is `text` in mid-line; None if it takes several, or is unknown."""
        if text not in self._found:
            ids = self._continue(text)
            alone = len(ids) == 1 and self.decode(ids) == text
            self._found[text] = ids[0] if alone else None
        return self._found[text]

    def save(self, directory: Path) -> None:
        """Writes the published files of the tokenizer into `directory`."""
        self._published.save_pretrained(directory)

    def _id_of(self, token: object) -> int | None:
        return None if token is None else self._published.backend_tokenizer.token_to_id(str(token))

    def _continue(self, text: str) -> list[int]:
        """The ids of a text that is not at the beginning: no mark for a beginning, no merge."""
        for anchor, ids, _ in self._anchors:
            joint = self._encode(anchor + text)
            if joint[: len(ids)] == ids:
                return joint[len(ids) :]
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        (ids,) = self._encode_all([text])
        return ids

    def _encode_all(self, texts: list[str]) -> list[list[int]]:
        encoded = self._published(
            texts,
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return list(encoded["input_ids"])

    def _raw_decode(self, ids: list[int]) -> str:
        return self._published.backend_tokenizer.decode(ids, skip_special_tokens=True)


def pieces(things: Iterable[T]) -> Iterator[list[T]]:
    """Things in lists of as many as are tokenised together; the last is shorter.

    Example:
      >>> [len(some) for some in pieces(range(1200))]
      [512, 512, 176]
    """
    rest = iter(things)
    return iter(lambda: list(itertools.islice(rest, TOGETHER)), [])


def load_tokenizer(name: str, *, ends_prompts: bool = False) -> Tokenizer:
    """Reads the tokenizer of a model.

    Args:
      name: The model's directory, as `weights.find_model` gives it.
      ends_prompts: Whether a prompt has an end token, as an encoder reads it.

    Raises:
      ValueError: the directory holds no tokenizer, or a broken one.
    """
    directory = Path(name)
    file = directory / "tokenizer.json"
    if file.is_file():
        try:
            json.loads(file.read_text())  # the reader below would not name the file
        except ValueError as error:
            raise ValueError(f"{file} is not JSON: {error}.") from None
        published = _find_class(directory).from_pretrained(name)
        return Tokenizer(published, ends_prompts=ends_prompts)
    if any((directory / older).is_file() for older in OLDER_FILES):
        published = transformers.AutoTokenizer.from_pretrained(name)
        return Tokenizer(published, ends_prompts=ends_prompts)
    raise ValueError(f"{name} holds no tokenizer.json; a student needs one beside its weights.")


def _find_class(directory: Path) -> type[PreTrainedTokenizerFast]:
    """What reads `tokenizer.json`: as it says, but for T5.

    T5's pieces drop white space at the end of a text. The published file does not say so, as
    SentencePiece did it; transformers mends that in a class of its own.
    """
    file = directory / "tokenizer_config.json"
    said = json.loads(file.read_text()).get("tokenizer_class") if file.is_file() else None
    return transformers.T5Tokenizer if said in T5_CLASSES else PreTrainedTokenizerFast


def padded_length(length: int) -> int:
    """The array length for so many tokens: 16, 24, 32, 48, 64, 96 ... so that programs are few.

    Example:
      >>> [padded_length(length) for length in (1, 16, 17, 25, 330)]
      [16, 16, 24, 32, 384]
    """
    size = 16
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size // 3 * 4
    return size
