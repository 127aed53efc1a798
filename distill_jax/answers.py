"""Reads the final answer out of a text, and says whether two answers agree.

An answer is *marked* when it follows `Answer:`, `the answer is`, `####` or `\\boxed{`. The last
mark that is followed by anything wins, so a correction of oneself counts. Without a mark, the last
number, choice letter or yes/no stands. What is not clear is unreadable, never guessed at.

The patterns are bounded or can't backtrack: reading takes time linear in the text.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from distill_jax.numerals import FILLER, last_number, marked_number
from distill_jax.records import Kind

UNREADABLE = "will_never_be_the_right_answer"
"""What the original code puts where it finds no answer."""

_RELATIVE_TOLERANCE = Fraction(1, 10**6)

_KEYBOARD = str.maketrans("\u2018\u2019\u2013\u2014", "''--")
_BLANK_LINE = re.compile(r"\n ?\n")
_NEXT_QUESTION = re.compile(r"\n\W{0,4}Question\b")
_MARK = re.compile(
    r"""(?<!find\ the\ )(?<!get\ the\ )(?<!reach\ the\ )\bans(?:wers?)?\s?\*{0,2}\s?[:=]
    | \banswer\s{1,3}(?:to\s[^.:\n]{1,60}?\s)?(?:is|was|equals|would\sbe|will\sbe)\b(?:\s?:)?
      (?!\s{1,3}(?:not|found|obtained)\b)
    | \#{4}
    | \\(?P<box>boxed|fbox)\s?\{""",
    re.IGNORECASE | re.VERBOSE,
)

_REJECTED = (
    r"(?![)\]]?\s{0,2}(?:(?:is|was|are|would|could|should|does|do)\s?(?:be\s)?"
    r"(?:not|n't|wrong|incorrect|false)\b|can'?t\b|cannot\b))"
)
_FIRST_LETTER = re.compile(
    FILLER
    + r"([a-z])(?![-.]\w)(?=\W{0,5}$|\s?[-).:,;*}\]]|\s(?:because|since|is|as)\b)"
    + _REJECTED,
    re.IGNORECASE,
)
_LOOSE_LETTER = re.compile(FILLER + r"([b-hj-z])(?=\s)" + _REJECTED, re.IGNORECASE)
_LETTER = re.compile(
    r"(?<!not )(?:(?<!\w)[(\[]([a-z])[)\]]|(?<![\w(\['])([a-z])\)"
    r"|\b(?:option|choice) ([b-hj-z])\b)" + _REJECTED,
    re.IGNORECASE,
)
_LAST_LETTER = re.compile(r"(?:\b(?:is|so|therefore|thus)|[,:])\s\W?([B-Z])\W*$")
_OTHER_LETTER = re.compile(
    r"[)\].*]{0,3}\s?(?:or|and|/)\s?(?:[(\[][a-z][)\]]|[b-hj-z]\b)", re.IGNORECASE
)

_FIRST_YES_NO = re.compile(
    FILLER + r"(yes|no|true|false)\b(?!\s?(?:or|and|/)\s?(?:yes|no)\b)", re.I
)
# "no" as in "no evidence" is not an answer: punctuation, an end of line or a pronoun follows one.
_YES_NO = re.compile(
    r"(?<![\w/-])(?<!not )(?<!yes or )(?<!yes and )(yes|no)"
    r"(?=\s{0,3}(?:(?!\.\s?[0-9])[.,!;:)\]}*\"']|$)"
    r"|\s{1,3}(?:it|they|he|she|this|that|there|we|you|i|because|since)\b)",
    re.IGNORECASE | re.MULTILINE,
)


def read_answer(text: str, kind: Kind, *, paragraphs: bool = False) -> str | None:
    """The final answer in a completion, normalised, or None if it can't be read.

    Args:
      text: A completion of the student or the teacher, or a bare answer such as a gold one.
      kind: What sort of answer to look for.
      paragraphs: Whether the text may run over several paragraphs, as a teacher's does. If not,
        it ends at its first blank line, where a student stops. A new `Question` ends both.

    Returns:
      Numbers exactly: `"18"`, `"0.75"`, or `"1/3"` where no decimal is exact; units, currency and
      per cent signs don't count. A lower-case choice letter; `"Yes"` or `"No"`; free text as
      written. Reading a returned answer gives the same answer.

    Example:
      >>> read_answer("4 eggs at $4.50 make $18.00.\\nAnswer: $18.00", "numeric")
      '18'
      >>> read_answer("Answer: 8. Wait, no. Answer: 9", "numeric")
      '9'
      >>> read_answer("(a) is wrong, so (e)", "choice")
      'e'
      >>> read_answer("I would rather not say.", "yes_no") is None
      True
    """
    text = _own_part(text, paragraphs=paragraphs)
    if kind != "text":
        text = text.translate(_KEYBOARD)
    marked, boxed = _marked(text)
    if kind == "numeric":
        return last_number(text) if marked is None else marked_number(marked)
    if kind == "choice":
        return _last_letter(text) if marked is None else _marked_letter(marked)
    if kind == "yes_no":
        return _last_yes_no(text) if marked is None else _marked_yes_no(marked)
    return _last_line(text) if marked is None else _marked_text(marked, boxed)


def same_answer(answer: str, gold: str, kind: Kind) -> bool:
    """Whether a predicted answer agrees with the gold one.

    Integers agree exactly; a decimal or fraction agrees within a millionth of the larger one. Free
    text agrees whatever its case, white space and punctuation.

    Args:
      answer: As `read_answer` returns it, or as a person would write it.
      gold: The gold answer as its question set has it: `"1,000"`, `"Yes"`, `"b"`, `"-5"`.
      kind: The kind of both.

    Raises:
      ValueError: the gold answer itself can't be read.

    Example:
      >>> same_answer("1000", "1,000", "numeric"), same_answer("5", "-5", "numeric")
      (True, False)
    """
    right = _read_again(gold, kind)
    if right is None:
        raise ValueError(f"a gold answer of kind {kind} must be readable as one; got {gold!r}.")
    given = _read_again(answer, kind)
    if given is None:
        return False
    if kind == "text":
        return _key(given) == _key(right)
    if kind != "numeric" or given == right:
        return given == right
    a, b = Fraction(given), Fraction(right)
    if a.denominator == b.denominator == 1:
        return False
    return abs(a - b) <= _RELATIVE_TOLERANCE * max(abs(a), abs(b))


@lru_cache(maxsize=4096)
def _read_again(answer: str, kind: Kind) -> str | None:
    """An answer that stands alone: the same few are compared again and again."""
    return read_answer(answer, kind)


def _own_part(text: str, *, paragraphs: bool) -> str:
    """The text up to where its writer stopped answering this question, spaces collapsed."""
    text = re.sub(r"[^\S\n]+", " ", text.strip())
    if not paragraphs:
        text = _BLANK_LINE.split(text, maxsplit=1)[0]
    return _NEXT_QUESTION.split(text, maxsplit=1)[0]


def _marked(text: str) -> tuple[str | None, bool]:
    """What follows the last mark that anything follows, and whether that mark was a box."""
    end = len(text)
    for match in reversed(list(_MARK.finditer(text))):
        marked = text[match.end() : end]
        if re.search(r"[^\W_]", marked):
            return marked, match["box"] is not None
        end = match.start()
    return None, False


def _last_letter(text: str) -> str | None:
    """The last letter that is written as a choice, or the one that the text opens or ends with."""
    found = list(_LETTER.finditer(text))
    if found:
        return (found[-1][1] or found[-1][2] or found[-1][3]).lower()
    last = _LAST_LETTER.search(text, max(0, len(text) - 40)) or _FIRST_LETTER.match(text)
    return last[1].lower() if last else None


def _marked_letter(text: str) -> str | None:
    """The first choice named, unless another one is named in the same breath."""
    match = _FIRST_LETTER.match(text) or _LETTER.search(text) or _LOOSE_LETTER.match(text)
    if match is None or _OTHER_LETTER.match(text, match.end()):
        return None
    return next(letter for letter in match.groups() if letter).lower()


def _last_yes_no(text: str) -> str | None:
    found = _YES_NO.findall(text)
    return found[-1].capitalize() if found else None


def _marked_yes_no(text: str) -> str | None:
    """The word that the text opens with, or else the last one that answers."""
    match = _FIRST_YES_NO.match(text)
    if match is None:
        return _last_yes_no(text)
    return "Yes" if match[1].lower() in ("yes", "true") else "No"


def _last_line(text: str) -> str | None:
    line = text.rsplit("\n", 1)[-1]
    empty_mark = _MARK.search(line)
    return _trimmed(line[: empty_mark.start()] if empty_mark else line)


def _marked_text(text: str, boxed: bool) -> str | None:
    """The first line, or what stands in the innermost braces."""
    if boxed:
        text = text.split("}", 1)[0].rpartition("{")[2]
    return _trimmed(text.strip("* \n").split("\n", 1)[0])


def _trimmed(text: str) -> str | None:
    """The text on one line, without quotes, emphasis and full stop; None if nothing is left."""
    text = " ".join(text.split()).strip("*\"'`\u2018\u2019\u201c\u201d .")
    return text if _key(text) else None


def _key(text: str) -> str:
    """What two free texts must share: no case, no white space, no punctuation but in numbers."""
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=[^\W\d])[-\u2013/](?=[^\W\d])", " ", text)
    text = re.sub(r"[^\w\s.,/-]|_|[.,/-](?!\d)|(?<=[^\W\d])[.,/-]", "", text)
    return " ".join(text.split())


def read_original(text: str, kind: Kind) -> str:
    """The answer as the released code of Wang et al. reads it, for a comparison beside ours.

    Its quirks are kept: a dash before a digit is always a sign, all commas go, "No," is no answer,
    the first bracketed letter a to e wins. Where it would crash (a text that ends in `Answer`) it
    finds nothing. It knows no free text; the rule for that is ours: all that follows `Answer:`.

    Returns:
      A string to compare by `same_original`; `UNREADABLE` where nothing was found.

    Source:
      Wang et al., "Democratizing Reasoning Ability" (EMNLP 2023), the released code's behaviour.

    Example:
      >>> read_original("$9 * 2\\nAnswer: $18.00", "numeric")
      '18.00'
      >>> read_original("5-3", "numeric")
      '-3'
    """
    text = text.strip().split("\n\n", 1)[0]
    if kind == "choice":
        line = text.split("\n", 1)[0].strip()
        found = re.findall(r"\(([a-e])\)", line) or re.findall(r"^[a-e]$", line)
        return found[0] if found else UNREADABLE
    mark = next((m for m in ("\nAnswer", "Therefore, the answer is") if m in text), None)
    part = text.split(mark)[1] if mark else text
    if kind == "numeric":
        found = [n.rstrip(".") for n in re.findall(r"-?\d+\.?\d*", part.replace(",", ""))]
    elif kind == "yes_no":
        words = (word.strip(".").lower() for word in part.split())
        found = [word for word in words if word in ("yes", "no")]
    else:
        found = [part.strip(": ")]
    if not found:
        return UNREADABLE
    return found[0] if mark else found[-1]


def same_original(answer: str, gold: str) -> bool:
    """Whether the released code would count `answer`: equal strings, whatever their case.

    Example:
      >>> same_original("18.00", "18")
      False
    """
    return answer.lower() == gold.lower()
