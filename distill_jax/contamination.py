"""Test questions among what is taught: found by hash and by overlap of eight words in a row.

What is found is left out and counted: a question that a student was taught is no test of it.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from distill_jax.records import Question

Reason = Literal["same", "overlapping"]

GRAM = 8
"""Words in a row that are looked for together; a shorter question is looked for as a whole."""
SHORT = 4
"""Questions of fewer words are found only where they are the whole text: sums hold many of them."""
SHARE = 0.7
"""Of a text's grams, so many in one test question make it that question in other words."""


class ExamTexts:
    """The texts of test questions, to be looked for in others.

    Source:
      Grams of eight words, and a share of 70%, are those of Chowdhery et al., "PaLM: Scaling
      Language Modeling with Pathways" (2022), section 8. Here the share is of the grams of one test
      question, or of the text if that has fewer: stories told by a template share many grams with
      all test questions together.

    Example:
      >>> tom = Question("t/1", "Tom has 2 eggs and finds 3. How many eggs has he?", "5", "test",
      ...                "numeric")
      >>> texts = ExamTexts([tom])
      >>> texts.find("Tom has 2 eggs, and finds 3! How many eggs has he?")
      'same'
      >>> texts.find("Today Tom has 2 eggs and finds 3. How many eggs has he?")
      'overlapping'
      >>> texts.find("Ann has 4 eggs and finds 3. How many eggs has she?") is None
      True
    """

    def __init__(self, questions: Iterable[Question]):
        words = [_words(question.text) for question in questions]
        self._hashes = set(map(_hash, words))
        grams = [_grams(text, min(len(text), GRAM)) if len(text) >= SHORT else () for text in words]
        self._sizes = [*map(len, grams)]
        self._places: dict[tuple[str, ...], list[int]] = {}
        for index, mine in enumerate(grams):
            for gram in mine:
                self._places.setdefault(gram, []).append(index)
        self._lengths = {len(gram) for gram in self._places}

    def find(self, text: str) -> Reason | None:
        """Whether a text is a test question or holds most of one."""
        words = _words(text)
        if _hash(words) in self._hashes:
            return "same"
        number = len(_grams(words, GRAM))
        shared = Counter(
            index
            for length in self._lengths
            for gram in _grams(words, length)
            for index in self._places.get(gram, ())
        )
        enough = (
            count >= SHARE * min(number, self._sizes[index]) for index, count in shared.items()
        )
        return "overlapping" if any(enough) else None

    def split(
        self, questions: Sequence[Question]
    ) -> tuple[list[Question], dict[Reason, list[str]]]:
        """The questions that may be taught, and the ids of the others by reason."""
        clean: list[Question] = []
        found: dict[Reason, list[str]] = {"same": [], "overlapping": []}
        for question in questions:
            reason = self.find(question.text)
            if reason is None:
                clean.append(question)
            else:
                found[reason].append(question.id)
        return clean, found


def _words(text: str) -> list[str]:
    """Words and numbers, without case and punctuation."""
    return re.findall(r"\w+(?:[.,]\d+)*", text.casefold())


def _hash(words: Sequence[str]) -> bytes:
    return hashlib.sha256(" ".join(words).encode(errors="replace")).digest()


def _grams(words: Sequence[str], length: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}
