"""A user's own questions: one JSON object per line, checked line by line."""

import difflib
import json
import re
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NoReturn, get_args

from distill_jax.questions.raw_files import QuestionsError
from distill_jax.records import Kind, Question, Split

KEYS = ("question", "answer", "id", "choices", "kind", "split", "solution", "group")
KINDS = get_args(Kind)
SPLITS = get_args(Split)
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NUMBER = re.compile(r"[-+]?\$?(\d[\d,]*(\.\d+)?|\.\d+)(/\d+)?%?")


def read_own_file(path: Path) -> list[Question]:
    """Reads questions from JSON lines.

    A row has `question` and `answer`, and may have (null is the same as absent):

    * `kind`: `numeric`, `choice`, `yes_no` or `text`. Without it a row with `choices` is `choice`,
      an answer yes, no, true or false is `yes_no`, a number `numeric`, anything else `text`.
    * `choices`: a list of texts; the answer is then the letter of one, `"a"` for the first.
    * `split`: `train` (without it), `dev` or `test`.
    * `id`: a text or whole number; without it, file name, split and position in the split.
    * `solution`: worked, ending in the answer; the built-in tutor teaches it. `group`: any text.

    Empty lines are skipped.

    Returns:
      The questions in file order.

    Raises:
      QuestionsError: the file is missing or holds no question, two rows share an id, or a row is
        malformed; the message names file, line, key, what was expected and what was given.
    """
    if not path.is_file():
        raise QuestionsError(f"task.name names a file of questions; there is no file {path}.")
    questions: dict[str, Question] = {}
    lines: dict[str, int] = {}
    num_by_split: Counter[str] = Counter()
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        row = _row(where, line)
        split = _one_of(where, row, "split", SPLITS, absent="train")
        id = _id(where, row, absent=f"{path.stem}/{split}/{num_by_split[split]}")
        if id in questions:
            _fail(where, "id", f"different in every row (line {lines[id]} has the same)", id)
        questions[id] = _question(where, row, id=id, split=split)
        lines[id] = number
        num_by_split[split] += 1
    if not questions:
        raise QuestionsError(f"{path} holds no question.")
    return list(questions.values())


def _row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode(), parse_float=Decimal, parse_constant=_refuse_constant)
    except ValueError as error:
        raise QuestionsError(f"{where}: not a JSON object in UTF-8: {error}.") from error
    if not isinstance(row, dict):
        raise QuestionsError(f"{where}: a JSON object was expected; got {_shown(row)}.")
    for key in row:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise QuestionsError(f"{where}: the keys are {', '.join(KEYS)}; got {key!r}{hint}.")
    return {key: value for key, value in row.items() if value is not None}


def _question(where: str, row: Mapping[str, Any], *, id: str, split: Split) -> Question:
    choices = _choices(where, row)
    written = _written_answer(where, row)
    kind = _one_of(where, row, "kind", KINDS, absent=_infer_kind(row, written))
    if choices and kind != "choice":
        _fail(where, "kind", "choice, or absent, where there are choices", kind)
    if kind == "choice" and not choices:
        _fail(where, "choices", "a list of two or more texts where kind is choice", None)
    return Question(
        id=id,
        text=_text(where, row, "question"),
        answer=_answer(where, row, written, kind=kind, choices=choices),
        split=split,
        kind=kind,
        choices=choices,
        solution=_text(where, row, "solution", absent=""),
        group=_text(where, row, "group", absent=""),
    )


def _infer_kind(row: Mapping[str, Any], written: str) -> Kind:
    if "choices" in row:
        return "choice"
    if written.lower() in ("yes", "no"):
        return "yes_no"
    if not isinstance(row["answer"], str) or NUMBER.fullmatch(written):
        return "numeric"
    return "text"


def _written_answer(where: str, row: Mapping[str, Any]) -> str:
    answer = row.get("answer")
    if isinstance(answer, bool):
        return "Yes" if answer else "No"
    if isinstance(answer, int | Decimal):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    _fail(where, "answer", "a text that is not empty, a number, true or false", answer)


def _answer(
    where: str, row: Mapping[str, Any], written: str, *, kind: Kind, choices: tuple[str, ...]
) -> str:
    """The answer as `Question` holds it, checked against its kind."""
    if kind == "choice":
        letters = LETTERS[: len(choices)]
        if len(written) != 1 or written.lower() not in letters:
            expected = f"the letter of a choice, {letters[0]} to {letters[-1]},"
            _fail(where, "answer", f"{expected} where kind is choice", row["answer"])
        return written.lower()
    if kind == "yes_no":
        if written.lower() not in ("yes", "no"):
            _fail(where, "answer", "yes or no where kind is yes_no", row["answer"])
        return written.capitalize()
    if kind == "numeric" and not NUMBER.fullmatch(written):
        expected = "a number such as 18, -5, 1,000, 0.75 or 3/4 where kind is numeric"
        _fail(where, "answer", expected, row["answer"])
    return written


def _choices(where: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices", [])
    texts = isinstance(choices, list) and all(isinstance(c, str) and c.strip() for c in choices)
    if not texts or not ("choices" not in row or 2 <= len(choices) <= len(LETTERS)):
        _fail(where, "choices", f"a list of 2 to {len(LETTERS)} texts, none empty", choices)
    return tuple(choice.strip() for choice in choices)


def _id(where: str, row: Mapping[str, Any], *, absent: str) -> str:
    id = row.get("id", absent)
    if isinstance(id, bool) or not isinstance(id, str | int) or not str(id).strip():
        _fail(where, "id", "a text that is not empty or a whole number", id)
    return str(id)


def _one_of(where: str, row: Mapping[str, Any], key: str, known: tuple, *, absent: Any) -> Any:
    value = row.get(key, absent)
    if value not in known:
        _fail(where, key, f"one of {', '.join(known)}", value)
    return value


def _text(where: str, row: Mapping[str, Any], key: str, *, absent: str | None = None) -> str:
    value = row.get(key, absent)
    if not isinstance(value, str) or not (value.strip() or value == absent):
        _fail(where, key, "a text that is not empty", value)
    return value.strip()


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _fail(where: str, key: str, expected: str, given: object) -> NoReturn:
    raise QuestionsError(f"{where}: {key} must be {expected}; got {_shown(given)}.")


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else f"{text[:80]}..."
