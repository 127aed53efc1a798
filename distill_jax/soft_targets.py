"""What else a teacher might have said, in the student's tokens: what soft targets are made from.

A teacher's tokens are not the student's. Where one of either covers the same characters, those of
the teacher's alternatives that are one token of the student, too, share its place.
"""

from collections.abc import Iterator, Sequence

from distill_jax.packing import Others
from distill_jax.records import Piece
from distill_jax.tokenizer import Tokenizer

ALTERNATIVES = 5
"""Likely tokens that a teacher is asked to name; every server that names any names so many."""


def find_others(
    tokenizer: Tokenizer,
    target: str,
    ids: Sequence[int],
    *,
    rationale: str,
    pieces: Sequence[Piece],
) -> Others:
    """What may stand in the place of each token of a target, and its share.

    The shares of a place and what they leave of 1 for the token itself stand to each other as the
    teacher's probabilities; what it found likely and the student can't say in one token is left
    out. White space that was changed and all that is not the teacher's rationale stay hard.

    Args:
      tokenizer: The student's.
      target: What it is trained to write, as `prompts.target` makes it.
      ids: The target's tokens.
      rationale: The part of the target that the teacher wrote.
      pieces: What the teacher's answer was put together from.

    Returns:
      For each of `ids` at most `ALTERNATIVES` others; () if no token has any.

    Source:
      Fu et al., "Specializing Smaller Language Models towards Multi-Step Reasoning" (ICML 2023)
      match distributions of the teacher's five likeliest tokens, aligned by dynamic programming.
    """
    chances = dict(_said(target, rationale, pieces))
    spans = _spans(tokenizer, target, ids) if chances else ()
    others = tuple(
        tuple(_shares(tokenizer, id, chances[span])) if span in chances else ()
        for id, span in zip(ids, spans, strict=False)
    )
    return others if any(others) else ()


def _said(
    target: str, rationale: str, pieces: Sequence[Piece]
) -> Iterator[tuple[tuple[int, int], tuple[tuple[str, float], ...]]]:
    """Where a teacher's tokens stand in the target, and how likely they and others were there.

    Both texts have the same words; between them the target has single spaces.
    """
    raw = "".join(text for text, _ in pieces)
    words, start = "".join(rationale.split()), target.find(rationale)
    first = "".join(raw.split()).find(words)
    if not words or start < 0 or first < 0:
        return
    theirs = [i for i, char in enumerate(raw) if not char.isspace()][first : first + len(words)]
    ours = [i for i, char in enumerate(rationale, start) if not char.isspace()]
    home = dict(zip(theirs, ours, strict=True))
    for i, j in list(home.items()):
        alone = i > 0 and raw[i - 1] == " " and not raw[i - 2 : i - 1].isspace()
        if alone and target[j - 1] == " ":
            home[i - 1] = j - 1
    end = 0
    for text, chances in pieces:
        begin, end = end, end + len(text)
        if chances and begin in home and all(i in home for i in range(begin, end)):
            yield (home[begin], home[end - 1] + 1), chances


def _spans(tokenizer: Tokenizer, text: str, ids: Sequence[int]) -> Iterator[tuple[int, int] | None]:
    """Where each token stands in the text; None for one that holds a part of a character."""
    start, group = 0, []
    for id in ids:
        group.append(id)
        said = tokenizer.decode(group)
        if said and text.startswith(said, start):
            yield from [None] * (len(group) - 1)
            yield (start, start + len(said)) if len(group) == 1 else None
            start, group = start + len(said), []
    yield from [None] * len(group)


def _shares(
    tokenizer: Tokenizer, id: int, chances: Sequence[tuple[str, float]]
) -> Iterator[tuple[int, float]]:
    """The likeliest others that are tokens, with their shares."""
    (_, own), *rest = chances
    named = ((tokenizer.find_token(text), chance) for text, chance in rest if chance)
    found = {other: chance for other, chance in named if other not in (None, id)}
    likeliest = sorted(found, key=found.__getitem__, reverse=True)[:ALTERNATIVES]
    total = own + sum(found[other] for other in likeliest)
    yield from ((other, found[other] / total) for other in likeliest)
