"""What a round is trained on: where its rationales come from, and which are left out."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from distill_jax.config import Config
from distill_jax.contamination import ExamTexts
from distill_jax.prompts import clean_rationale
from distill_jax.records import Attempt, Question, Rationale
from distill_jax.run_folder import round_folder, stream_records
from distill_jax.teaching import wants_rationales


def choose(
    config: Config,
    folder: Path,
    questions: Sequence[Question],
    exam_texts: ExamTexts,
    *,
    round_index: int,
    left_out: Counter[str],
) -> Iterator[Rationale]:
    """The rationales of a round, from the files of the rounds that `train.rows` names.

    Args:
      config: The run's settings.
      folder: The run, with this round's lesson finished.
      questions: All training questions.
      exam_texts: Of the test questions: a rationale that holds one is left out.
      round_index: From 1.
      left_out: Gains how many were not approved (`doubted`) or hold a test question.

    Yields:
      What to train on, each text once. Where only bare answers are learnt, a rationale without a
      text for every training question.
    """
    if not wants_rationales(config):
        for question in questions:
            yield Rationale(question.id, round_index, 0, "", question.answer, "kept")
        return
    first = 1 if "old" in config.train.rows else round_index
    rounds = {index: round_folder(folder, index) for index in range(first, round_index + 1)}
    judged = (stream_records(path / "judged.jsonl", Rationale) for path in rounds.values())
    approved = set(map(_digest, itertools.chain.from_iterable(judged)))
    seen: set[bytes] = set()
    for index, path in rounds.items():
        for row in read_sources(config, path, old=index < round_index):
            digest = _digest(row)
            if digest in seen:
                continue
            seen.add(digest)
            if "judged" in config.train.rows and digest not in approved:
                left_out["doubted"] += 1
            elif exam_texts.find(row.text) is not None:
                left_out["test_question"] += 1
            else:
                yield row


def _digest(row: Rationale) -> bytes:
    """Stands for a question and a text: rationales are many, and texts long."""
    text = f"{row.question_id}\n{row.text}".encode(errors="surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def read_sources(config: Config, path: Path, *, old: bool = False) -> Iterator[Rationale]:
    """The rationales of one round that may be trained on.

    Args:
      config: The run's settings.
      path: The round's folder, with its lesson and exam finished.
      old: Whether the round is an earlier one, whose lesson counts though new ones don't.
    """
    if old or "new" in config.train.rows:
        lesson = stream_records(path / "lesson.jsonl", Rationale)
        yield from (row for row in lesson if row.verdict == "kept")
    if "own" in config.train.rows:
        yield from own_rationales(stream_records(path / "exam.jsonl", Attempt))


def own_rationales(attempts: Iterable[Attempt]) -> Iterator[Rationale]:
    """The student's right answers at an exam as rationales to train on; empty ones left out.

    Example:
      >>> right = Attempt("t/1", 0, 2, " 3 + 4 = 7.\\nAnswer: 7", "7", True, False, 9)
      >>> [row.text for row in own_rationales([right])]
      ['3 + 4 = 7.']
    """
    for attempt in attempts:
        text = clean_rationale(attempt.text) if attempt.correct and not attempt.cut else ""
        if text:
            opened = attempt.round_index + 1  # the round that the exam opens
            yield Rationale(
                attempt.question_id, opened, attempt.sample_index, text, attempt.answer, "kept"
            )
