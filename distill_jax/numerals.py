"""Numbers as people write them: `$1,000.50`, `-3/4`, `1 1/2`, `2e3`, `forty-two`.

Every number is kept exactly. The patterns are bounded or can't backtrack: reading takes time
linear in the text.
"""

import re
from collections.abc import Iterator
from fractions import Fraction
from typing import NamedTuple

MAX_DIGITS = 60
"""Longer numbers and exponents are unreadable: no question has them, and they cost time."""

FILLER = (
    r"[\W_]*(?:(?:about|approximately|exactly|roughly|around|only|simply|just|now|then|thus|so|"
    r"therefore|equal|to|usd|rs|text|option|choice|letter)[\W_]+)*"
)
"""Words and signs that may stand between a mark and its answer; `text` is LaTeX's."""

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_NUMBER = re.compile(
    rf"""(?P<sign>(?:[-+]|\b(?:minus|negative)\ )[$£€]?)?
    (?:(?<![\w^])(?<!\^\{{)|(?<=\busd)|(?<=\brs))
    (?:(?P<whole>[0-9]{{1,9}})\ (?=[0-9]{{1,9}}/[0-9]))?
    (?P<number>{_DECIMAL})(?:\ ?/\ ?(?P<denominator>{_DECIMAL}))?
    (?:(?:e|\ ?(?:x|\*|\\times)\ ?10\^\{{?)(?P<exponent>[-+]?[0-9]+)(?!\w))?""",
    re.IGNORECASE | re.VERBOSE,
)
_OPERATION = re.compile(
    r"[%)]?\s?(?:[a-z]{1,15}\s)?(?:[-+*/^x]|plus|minus|times|or|to)\s?[$£€]?[0-9]|:[0-9]"
    r"|%?\sof\s[^,;(\n=]{1,30}=",
    re.I,
)
_RESULT = re.compile(r"(?:=|\b(?:is|are|equals|gets?|gives?|makes?|leaves?))\W*$", re.I)
_SENTENCE_END = re.compile(r"[.!?](?=\s)|[;\n]")
_PLAIN = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d", "-")  # hyphens, dashes, minus
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}  # full width
    | {
        "½": r"\frac{1}{2}",
        "¼": r"\frac{1}{4}",
        "¾": r"\frac{3}{4}",
        "\u2044": "/",
        "\u00a0": " ",
        "\u202f": " ",
    }
    | {"\u00d7": "*", "\u00f7": "/", "≈": "="}
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\{(-?[0-9]{1,30})\}\{([0-9]{1,30})\}")

_BELOW_20 = re.findall(
    r"\w+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen",
)
_TENS = re.findall(r"\w+", "twenty thirty forty fifty sixty seventy eighty ninety")
_WORDS = re.compile(FILLER + r"(?P<sign>(?:minus|negative) )?(?P<words>[a-z]+(?:[ -][a-z]+){0,5})")
# "one of", "five or", "two and a half", "three thousand": the first word is not the number.
_NOT_ALONE = re.compile(
    r"of|or|and|to|more|point|plus|minus|times|hundred|thousand|million"
    r"|half|halves|(?:third|quarter|fourth|fifth|sixth|eighth|tenth)s?"
)


class _Found(NamedTuple):
    """A number in a text, and the text between the number before and this one."""

    match: re.Match[str]
    negative: bool
    before: str


def last_number(text: str) -> str | None:
    """The last number of a text, exactly, or None if there is none or it is absurd.

    Example:
      >>> last_number("5 - 3 = 2"), last_number("it falls to -$1,250.50")
      ('2', '-1250.5')
    """
    found = list(_numbers(_plain(text)))
    return _value(found[-1]) if found else None


def marked_number(text: str) -> str | None:
    """The number that a text gives as its answer: the text is what follows "the answer is".

    It is the first number, or the result of the calculation that stands in its place.

    Example:
      >>> marked_number("$18, or $6 each"), marked_number("16 + 2 = 18."), marked_number("five.")
      ('18', '18', '5')
    """
    text = _plain(text)
    spelled = _spelled_number(text)
    if spelled is not None:
        return spelled
    found = list(_numbers(text))
    if not found:
        return None
    first = found[0]
    direct = re.fullmatch(FILLER, text[: first.match.start()], re.IGNORECASE) is not None
    calculation = _OPERATION.match(text, first.match.end()) is not None
    if direct and not calculation:
        return _value(first)
    stop = _SENTENCE_END.search(text, first.match.end())
    end = stop.start() if stop else len(text)
    results = [
        each for each in found if each.match.start() < end and _RESULT.search(each.before[-20:])
    ]
    if results:
        return _value(results[-1])
    return None if direct else _value(first)


def _plain(text: str) -> str:
    """The text with typographic and LaTeX signs as a keyboard has them."""
    text = re.sub(r"(?<=[0-9])(?=\\[dt]?frac)", " ", text.translate(_PLAIN))
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return text.replace("{,}", ",").replace("\\,", ",")


def _numbers(text: str) -> Iterator[_Found]:
    """Every number in the text, in order, but for those that "not" stands before."""
    end = 0
    for match in _NUMBER.finditer(text):
        before = text[end : match.start()]
        # In "5 - 3", "5-3" and "(2 + 3) -1" the dash is an operator, not a sign.
        touching = end > 0 and not before.strip(" ")
        follows_value = before[-1:].isalnum() or before.rstrip().endswith((")", "]", "}", "%"))
        signed = match["sign"] is not None and not match["sign"].startswith("+")
        if not before.lower().endswith("not "):
            yield _Found(match, signed and not touching and not follows_value, before)
        end = match.end()


def _value(found: _Found) -> str | None:
    """The number as written out by `_written`; None if it is one that no one can mean."""
    match = found.match
    digits = match["number"]
    only_digits = match["whole"] is None and match.end() == match.end("number")
    if only_digits and digits.isdigit() and len(digits) < MAX_DIGITS:  # as nearly all are
        return str(-int(digits) if found.negative else int(digits))
    parts = [match[name] or "" for name in ("number", "denominator", "exponent")]
    if any(len(part) > MAX_DIGITS for part in parts):
        return None
    number, denominator = (Fraction(part.replace(",", "") or 1) for part in parts[:2])
    exponent = int(parts[2] or 0)
    if denominator == 0 or abs(exponent) > MAX_DIGITS:
        return None
    value = (int(match["whole"] or 0) + number / denominator) * Fraction(10) ** exponent
    written = _written(-value if found.negative else value)
    return written if len(written) <= MAX_DIGITS else None


def _written(value: Fraction) -> str:
    """The number as an exact decimal if it has one, as a fraction if not."""
    places, rest = 0, value.denominator
    while rest % 10 == 0:
        places, rest = places + 1, rest // 10
    for factor in (2, 5):
        while rest % factor == 0:
            places, rest = places + 1, rest // factor
    if rest != 1:
        return str(value)
    sign = "-" if value < 0 else ""
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole, decimals = digits[: len(digits) - places], digits[len(digits) - places :]
    return f"{sign}{whole}.{decimals.rstrip('0')}".rstrip(".")


def _spell(number: int) -> str:
    if number < 20:
        return _BELOW_20[number]
    if number < 100:
        return f"{_TENS[number // 10 - 2]} {_BELOW_20[number % 10] if number % 10 else ''}".strip()
    rest = _spell(number % 100) if number % 100 else ""
    return f"{_BELOW_20[number // 100]} hundred {rest}".strip()


_SPELLED = {_spell(number): number for number in range(1000)}


def _spelled_number(text: str) -> str | None:
    """The number below a thousand that a text spells out in its first words."""
    match = _WORDS.match(text.lower())
    if match is None:
        return None
    words = re.split("[ -]", match["words"].replace("hundred and ", "hundred "))
    for length in range(min(len(words), 4), 0, -1):
        number = _SPELLED.get(" ".join(words[:length]))
        if number is not None:
            following = "".join(words[length : length + 1])
            if _NOT_ALONE.fullmatch(following) or following in _SPELLED:
                return None
            return str(-number if match["sign"] else number)
    return None
