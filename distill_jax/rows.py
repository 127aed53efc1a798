"""Attempts and rationales become rows to train on, in token ids, held in few bytes.

A row is one kept rationale. Texts, and which of them may be paired, are held as numbers in arrays;
a row is put together when somebody asks for it.

Letters: R rows.
"""

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from distill_jax.int_lists import IntLists, Prompts, Tokens
from distill_jax.packing import Item, Others
from distill_jax.prompts import answer_target, mistake_target, target
from distill_jax.records import GREEDY, Attempt, Form, Question, Rationale
from distill_jax.soft_targets import find_others
from distill_jax.tokenizer import Tokenizer, pieces

MAX_POSITIVES = 10
MAX_NEGATIVES = 4


@dataclass(frozen=True)
class Row:
    """One rationale to train on, in token ids, and what it may be paired with."""

    question_id: str
    question: Tokens  # the prompt behind the shared beginning
    anchor: Tokens
    positives: tuple[Tokens, ...]
    negatives: tuple[Tokens, ...]
    others: Others = ()  # what else may stand in the anchor's places


@dataclass(frozen=True, eq=False)
class Rows(Sequence[Row]):
    """All rows of a round.

    With one form, rationales, `len(rows) + sum(dropped.values())` is how many were handed in.

    Attributes:
      names: The questions' ids.
      prompts: Of each question one for every form, in order.
      texts: Anchors and mistakes.
      heads: The prompt of each row, R numbers.
      anchors: The text of each row, R numbers.
      positives, negatives: The texts of each row's pools, R lists of numbers.
      others: What else may stand in an anchor's places, by row; the rows that have any.
      dropped: Rationales that are no row, by reason.
      num_cut_mistakes: Mistakes too long for the context: cut there, end token forced.
    """

    names: Sequence[str]
    prompts: Prompts
    texts: IntLists
    heads: Sequence[int]
    anchors: Sequence[int]
    positives: IntLists
    negatives: IntLists
    others: Mapping[int, Others] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    num_cut_mistakes: int = 0

    def __len__(self) -> int:
        return len(self.heads)

    def __getitem__(self, index: int) -> Row:
        pools = (self.positives[index], self.negatives[index])
        positives, negatives = (tuple(self.texts[i] for i in pool) for pool in pools)
        return Row(
            self.names[self.question(index)],
            self.prompts.behind(self.heads[index], self._num_shared),
            self.texts[self.anchors[index]],
            positives,
            negatives,
            self.others.get(index, ()),
        )

    @property
    def shared(self) -> Tokens:
        """What every prompt begins with, but for the last common token.

        It stays with the rows: demonstrations always go on with the same one.
        """
        return tuple(self.prompts.first[: self._num_shared])

    @property
    def num_pairs(self) -> int:
        """Rows that have a positive and a negative."""
        return int(np.sum((self.positives.lengths > 0) & (self.negatives.lengths > 0)))

    @property
    def num_targets(self) -> int:
        """Tokens to be written."""
        return int(self.texts.lengths[self.anchors].sum())

    @property
    def num_soft(self) -> int:
        """Those that share their place with others."""
        return sum(bool(others) for each in self.others.values() for others in each)

    def question(self, index: int) -> int:
        """The number of a row's question."""
        return self.heads[index] * len(self.names) // len(self.prompts)

    def item(self, index: int, draws: Sequence[float], *, blank: bool = False) -> Item:
        """A row with one positive and one negative; () from an empty pool.

        Args:
          index: Of the row.
          draws: Two numbers from 0 to 1 that choose them.
          blank: Leaves the tokens 0: enough where lengths are all that counts, and quicker.
        """
        positive, negative = (
            self._text(pool.get(index, int(draw * pool.length(index))), blank=blank)
            if pool.length(index)
            else ()
            for pool, draw in zip((self.positives, self.negatives), draws, strict=True)
        )
        head, start = self.heads[index], self._num_shared
        return Item(
            (0,) * (self.prompts.length(head) - start)
            if blank
            else self.prompts.behind(head, start),
            self._text(self.anchors[index], blank=blank),
            positive,
            negative,
            self.others.get(index, ()),
        )

    def _text(self, number: int, *, blank: bool) -> Tokens:
        return (0,) * self.texts.length(number) if blank else self.texts[number]

    @property
    def _num_shared(self) -> int:
        return max(self.prompts.num_common - 1, 0)


def make_rows(
    rationales: Iterable[Rationale],
    attempts: Iterable[Attempt],
    questions: Mapping[str, Question],
    *,
    tokenizer: Tokenizer,
    prompts: Mapping[Form, Callable[[Question], str]],
    max_length: int,
    seed: int,
) -> Rows:
    """Tokenises what a round is trained on.

    Args:
      rationales: The kept ones; each becomes a row of every form that asks for rationales, and
        their questions' bare answers one of every form that asks for these. What becomes no row
        is counted in `dropped`.
      attempts: The exam before this round, those at one question together. Its drawn samples that
        are wrong are the negatives.
      questions: By id; holds every rationale's question.
      tokenizer: The student's.
      prompts: The forms, each with what gives a question's prompt, demonstrations included. The
        first is the exam's: only its rows have negatives.
      max_length: Tokens that the student can hold; a longer row is dropped as `too_long`.
      seed: Chooses the pools where a question has more texts than a pool holds.

    Raises:
      ValueError: attempts at one question do not stand together.

    Source:
      Wang et al. (EMNLP 2023): positives are other rationales of the question with a different
      text, at most 10 kept; negatives are the distinct wrong samples, at most 4 kept.
    """
    maker = _Maker(tokenizer, questions, prompts, max_length)
    count = 0
    for some in pieces(rationales):
        maker.add_rationales(some)
        count += len(some)
    for some in pieces(_wrong_texts(attempts, maker.numbers)):
        maker.add_mistakes(some)
    return maker.finish(np.random.default_rng([seed, count]))


class _Maker:
    """Rows while they are made.

    Attributes:
      numbers: The questions that have rationales, by id, in the order in which they came.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        questions: Mapping[str, Question],
        prompts: Mapping[Form, Callable[[Question], str]],
        max_length: int,
    ):
        self.numbers: dict[str, int] = {}
        self._tokenizer, self._questions, self._words = tokenizer, questions, prompts
        self._max_length = max_length
        self._prompts, self._texts = Prompts(), IntLists(tokenizer.num_tokens)
        self._forms = {form: _FormRows() for form in prompts}
        self._mistakes, self._mistaken = array("i"), array("i")  # texts, and of which question
        self._num_cut = 0

    def add_rationales(self, rationales: Sequence[Rationale]) -> None:
        """Adds rows of all forms."""
        new = {row.question_id: None for row in rationales if row.question_id not in self.numbers}
        for id in new:
            self.numbers[id] = len(self.numbers)
        texts = (self._words[form](self._questions[id]) for id in new for form in self._words)
        for ids in self._tokenizer.encode_prompts(texts):
            self._prompts.append(ids)
        asked = {id: self._questions[id] for id in (row.question_id for row in rationales)}
        for form in self._words:
            if form.startswith("rationale"):
                texts = [target(asked[row.question_id], row.text) for row in rationales]
                self._add(form, [row.question_id for row in rationales], texts, rationales)
            else:
                self._add(form, [*new], [answer_target(asked[id]) for id in new])

    def _add(
        self,
        form: Form,
        ids: Sequence[str],
        texts: Sequence[str],
        sources: Sequence[Rationale | None] = (),
    ) -> None:
        rows = self._forms[form]
        encoded = self._encode(form, ids, texts)
        for id, text, source, anchor in itertools.zip_longest(ids, texts, sources, encoded):
            head = self._head(form, id)
            if self._prompts.length(head) + len(anchor) > self._max_length:
                rows.num_long += 1
                continue
            if source and source.pieces:
                said = {"rationale": source.text, "pieces": source.pieces}
                rows.others[len(rows.heads)] = find_others(self._tokenizer, text, anchor, **said)
            rows.heads.append(head)
            rows.anchors.append(self._texts.append(anchor))

    def add_mistakes(self, wrong: Sequence[tuple[str, str]]) -> None:
        """Adds wrong texts, each with its question's id."""
        form = next(iter(self._words))
        ids, texts = zip(*wrong, strict=True)
        encoded = self._encode(form, ids, [mistake_target(text) for text in texts])
        for id, tokens in zip(ids, encoded, strict=True):
            room = self._max_length - self._prompts.length(self._head(form, id))
            if room <= 0:
                continue
            if len(tokens) > room:
                self._num_cut += 1
                tokens = [*tokens[: room - 1], tokens[-1]]
            self._mistaken.append(self.numbers[id])
            self._mistakes.append(self._texts.append(tokens))

    def finish(self, pick: np.random.Generator) -> Rows:
        """All rows, form by form, with their pools."""
        forms = self._forms.values()
        heads, anchors = (
            array("i", itertools.chain.from_iterable(getattr(form, name) for form in forms))
            for name in ("heads", "anchors")
        )
        firsts = itertools.accumulate([0, *(len(form.heads) for form in forms)])
        others = {
            first + index: found
            for first, form in zip(firsts, forms, strict=False)
            for index, found in form.others.items()
            if found
        }
        different, own = _find_different(self._texts, heads, anchors, len(self._prompts))
        mistakes = np.asarray(self._mistakes)
        of_question = _groups(self._mistaken, len(self.numbers))
        positives, negatives = IntLists(), IntLists()
        for index, head in enumerate(heads):
            number, form = divmod(head, len(forms))
            wrong = [] if form else mistakes[of_question(number)].tolist()
            right = [text for text in different[head] if text != own[index]]
            positives.append(_pool(right, MAX_POSITIVES, pick))
            negatives.append(_pool(wrong, MAX_NEGATIVES, pick))
        num_long = sum(form.num_long for form in forms)
        return Rows(
            names=[*self.numbers],
            prompts=self._prompts,
            texts=self._texts,
            heads=heads,
            anchors=anchors,
            positives=positives,
            negatives=negatives,
            others=others,
            dropped={"too_long": num_long} if num_long else {},
            num_cut_mistakes=self._num_cut,
        )

    def _head(self, form: Form, id: str) -> int:
        return self.numbers[id] * len(self._forms) + [*self._forms].index(form)

    def _encode(self, form: Form, ids: Sequence[str], texts: Sequence[str]) -> Iterator[list[int]]:
        """Targets behind their questions' prompts."""
        asked = [self._words[form](self._questions[id]) for id in ids]
        heads = [self._prompts.behind(self._head(form, id), 0) for id in ids]
        return self._tokenizer.encode_targets(asked, heads, texts)


@dataclass
class _FormRows:
    """The rows of one form while they are made."""

    heads: array = field(default_factory=lambda: array("i"))
    anchors: array = field(default_factory=lambda: array("i"))
    others: dict[int, Others] = field(default_factory=dict)
    num_long: int = 0


def _find_different(
    texts: IntLists, heads: Sequence[int], anchors: Sequence[int], num_prompts: int
) -> tuple[IntLists, Sequence[int]]:
    """The texts of each prompt, equal ones once, and which of them each row has."""
    different, own = IntLists(), array("i", anchors)
    rows_of = _groups(heads, num_prompts)
    for prompt in range(num_prompts):
        found: dict[Tokens, int] = {}
        for row in rows_of(prompt).tolist():
            own[row] = found.setdefault(texts[anchors[row]], anchors[row])
        different.append([*found.values()])
    return different, own


def _groups(names: Sequence[int], count: int) -> Callable[[int], np.ndarray]:
    """Gives the places at which each of `count` numbers stands, in order."""
    order = np.argsort(names, kind="stable")
    ends = np.searchsorted(np.asarray(names)[order], np.arange(count + 1))
    return lambda name: order[ends[name] : ends[name + 1]]


def _wrong_texts(
    attempts: Iterable[Attempt], questions: Mapping[str, int]
) -> Iterator[tuple[str, str]]:
    """Each question's distinct wrong samples, in the order drawn; empty texts are no mistakes."""
    over = np.zeros(len(questions), bool)
    for id, group in itertools.groupby(attempts, key=lambda attempt: attempt.question_id):
        if id not in questions:
            continue
        if over[questions[id]]:
            raise ValueError(f"attempts at one question stand together; those at {id!r} do not.")
        over[questions[id]] = True
        wrong = (a.text.strip() for a in group if a.sample_index != GREEDY and not a.correct)
        yield from ((id, text) for text in dict.fromkeys(wrong) if text)


def _pool(texts: Sequence[int], size: int, pick: np.random.Generator) -> Sequence[int]:
    if len(texts) <= size:
        return texts
    return [texts[i] for i in sorted(pick.choice(len(texts), size, replace=False))]
