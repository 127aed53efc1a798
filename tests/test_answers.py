"""Answers: golden endings, properties of any text, and real gold answers."""

import json
import re
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill_jax.answers import (
    UNREADABLE,
    read_answer,
    read_original,
    same_answer,
    same_original,
)
from distill_jax.records import Kind

ENDINGS = [
    json.loads(line)
    for line in (Path(__file__).parent / "golden" / "endings.jsonl").read_text().splitlines()
]
KINDS = get_args(Kind)

# Texts made of the very pieces that the reader looks for find more than letters at random do.
PIECES = st.sampled_from(
    re.split(
        "~",
        "answer~Answer:~ans~the~is~not ~####~\\boxed{~}~\\frac{1}{2}~\\text{~**~$~%~(~)~(a)~(B)~b)~"
        ".~,~;~-~+~/~=~5~0~-5~1,000~.5~1e9~10^~yes~No~true~or~and~five~hundred~half~Question:~a~I~"
        "U.S.~½~\u2212~é~\n~\n\n~ ~  ~\t~\u2028~minus ",
    )
)
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=12).map("".join))


@pytest.mark.parametrize("row", ENDINGS, ids=[f"{row['kind']}: {row['note']}" for row in ENDINGS])
def test_golden_ending(row: dict) -> None:
    assert read_answer(row["text"], row["kind"]) == row["answer"]


def test_there_are_enough_endings_of_every_kind() -> None:
    assert len(ENDINGS) >= 150
    assert len({(row["kind"], row["text"]) for row in ENDINGS}) == len(ENDINGS)
    by_kind = Counter(row["kind"] for row in ENDINGS)
    assert set(by_kind) == set(KINDS) and min(by_kind.values()) >= 10


@settings(max_examples=400, deadline=None)
@given(TEXTS, st.sampled_from(KINDS), st.booleans())
def test_any_text_is_read_without_an_error_and_its_answer_reads_as_itself(
    text: str, kind: Kind, paragraphs: bool
) -> None:
    answer = read_answer(text, kind, paragraphs=paragraphs)
    read_original(text, kind)
    if answer is not None:
        assert read_answer(answer, kind) == answer
        assert same_answer(answer, answer, kind)
        assert same_answer(text, answer, kind) or paragraphs


INTEGERS = st.integers(-(10**9), 10**9)
DECIMALS = st.builds(lambda n, places: Fraction(n, 10**places), INTEGERS, st.integers(0, 6))


def variants(value: Fraction) -> list[str]:
    """One number as many people would write it."""
    whole, rest = divmod(abs(value), 1)
    decimals = f"{int(rest * 10**6):06}".rstrip("0")
    digits = f"{whole}.{decimals}".rstrip(".")
    grouped = f"{whole:,}.{decimals}".rstrip(".")
    sign = "-" if value < 0 else ""
    cents = f"{grouped}.00" if "." not in grouped else f"{grouped}00"
    return [
        f"{sign}{digits}",
        f"{sign}{grouped}",
        f"{sign}${grouped}",
        f"{sign}{cents} dollars",
        f"Answer: {sign}${cents}.",
        f"Some 12 words - 3.\nAnswer: {sign}{grouped}%",
        f"So the answer is **{sign}{grouped}**.",
        f"7 + 8 is not it\n#### {sign}{grouped}",
        f"thus \\boxed{{{sign}{digits}}}",
        f"Answer: {value}".replace("-", "\u2212"),
    ]


@settings(max_examples=100, deadline=None)
@given(DECIMALS)
def test_every_way_to_write_a_number_reads_the_same(value: Fraction) -> None:
    answers = {text: read_answer(text, "numeric") for text in variants(value)}
    assert {Fraction(answer or "nan") for answer in answers.values()} == {value}, answers
    for text in answers:
        assert same_answer(text, str(value), "numeric")


@settings(max_examples=200, deadline=None)
@given(INTEGERS, INTEGERS.filter(bool))
def test_a_wrong_integer_never_equals_the_gold_one(gold: int, off: int) -> None:
    for text in variants(Fraction(gold + off)):
        assert not same_answer(text, str(gold), "numeric")
        assert not same_answer(text, f"{gold:,}", "numeric")


@pytest.mark.parametrize(
    ("answer", "gold", "kind", "same"),
    [
        ("18", "18", "numeric", True),
        ("18.00", "18", "numeric", True),
        ("$1,000", "1,000", "numeric", True),
        ("1000", "1,000", "numeric", True),
        ("-5", "-5", "numeric", True),
        ("5", "-5", "numeric", False),
        ("0.75", "3/4", "numeric", True),
        ("1/3", "0.3333333", "numeric", True),
        ("1/3", "0.333", "numeric", False),
        ("17.999999999", "18", "numeric", True),
        ("17.99", "18", "numeric", False),
        ("10000001", "10000000", "numeric", False),
        ("0.0000001", "0", "numeric", False),
        ("-0", "0", "numeric", True),
        ("what?", "18", "numeric", False),
        ("B", "b", "choice", True),
        ("a", "b", "choice", False),
        ("yes", "Yes", "yes_no", True),
        ("No", "Yes", "yes_no", False),
        (" new   york!", "New York", "text", True),
        ("U.S.A.", "usa", "text", True),
        ("well-known", "well known", "text", True),
        ("1.5", "15", "text", False),
        ("-5", "5", "text", False),
        ("Paris", "Rome", "text", False),
    ],
)
def test_same_answer(answer: str, gold: str, kind: Kind, same: bool) -> None:
    assert same_answer(answer, gold, kind) is same


def test_a_gold_answer_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gold answer of kind numeric must be .* got 'n/a'"):
        same_answer("18", "n/a", "numeric")


def test_a_teacher_may_write_paragraphs_up_to_another_question() -> None:
    reply = "First, 3 + 5 = 8.\n\nThen 8 * 2 = 16.\n\nAnswer: 16\n\nQuestion: And 4 + 5?\nAnswer: 9"
    assert read_answer(reply, "numeric", paragraphs=True) == "16"
    assert read_answer(reply, "numeric") == "8"


REPEATED = re.split(
    "~",
    "1~1,~111,111,~1.~1/~1e9~1 ~-~-1~- ~(~(a)~b)~####~\\boxed{~{~}~answer~answer ~answer:~"
    "answer is~not ~is=~=~= ~so_~so ~five ~five-~no~yes/~*~_~a~.~\n~\n ~ ",
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", KINDS)
def test_long_texts_take_linear_time(kind: Kind) -> None:
    """Quadratic reading of such texts takes minutes; the limit is far above what linear takes."""
    for piece in REPEATED:
        size = 200_000 if piece in ("1", "1,", "111,111,") else 50_000
        long = piece * (size // len(piece))
        read_answer(long, kind)
        read_answer(f"Answer: so{long}!", kind)
        read_original(long, kind)


@pytest.mark.parametrize(
    ("text", "kind", "answer"),
    [
        ("It is 7.\nAnswer: 18 and 19", "numeric", "18"),
        ("It is 7. Therefore, the answer is 18 or 19.", "numeric", "18"),
        ("8.\nTherefore, the answer is 7.\nAnswer: 18.\nAnswer: 19", "numeric", "18"),
        ("7 and then 18.", "numeric", "18"),
        ("Answer: 18 and 19", "numeric", "19"),  # no newline before it: not its mark
        ("it costs $1,000.00.", "numeric", "1000.00"),
        ("5-3", "numeric", "-3"),
        ("18\n\n19", "numeric", "18"),
        ("no number", "numeric", UNREADABLE),
        ("so\nAnswer", "numeric", UNREADABLE),
        ("So, the answer is No.\nAnswer: Yes no", "yes_no", "yes"),
        ("yes at first, then no.", "yes_no", "no"),
        ("No, never", "yes_no", UNREADABLE),
        ("(a) is wrong, so (e)", "choice", "a"),
        ("so (E)", "choice", UNREADABLE),
        ("c", "choice", "c"),
        ("first line\n(b)", "choice", UNREADABLE),
        ("It is\nAnswer: Paris", "text", "Paris"),
    ],
)
def test_the_original_rule_and_its_quirks(text: str, kind: Kind, answer: str) -> None:
    assert read_original(text, kind) == answer


def test_the_original_compares_strings() -> None:
    assert same_original("yes", "Yes")
    assert not same_original("18.00", "18")


@pytest.mark.parametrize(("split", "never_right"), [("train", 79), ("test", 14)])
def test_real_gold_answers(shared: Path, split: str, never_right: int) -> None:
    """Every GSM8K solution reads as its gold; the original can't match golds with commas."""
    with (shared / "data" / "gsm8k" / f"{split}.jsonl").open() as file:
        solutions = [json.loads(line)["answer"] for line in file]
    missed = 0
    for solution in solutions:
        gold = solution.split("#### ")[1]
        assert read_answer(gold, "numeric") == gold.replace(",", "")
        assert read_answer(solution, "numeric", paragraphs=True) == gold.replace(",", "")
        answer = read_original(f"so\nAnswer: {gold}", "numeric")
        missed += not same_original(answer, gold)
    assert missed == never_right
