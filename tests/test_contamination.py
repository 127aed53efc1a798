"""What counts as a test question among what is taught."""

import dataclasses

import pytest

from distill_jax.contamination import GRAM, SHARE, ExamTexts
from distill_jax.questions.arithmetic import make_questions
from distill_jax.records import Question

WORDS = [
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
]
TEST = Question("t/1", " ".join(WORDS), "1", "test", "numeric")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (
            "ONE two, three: four five six seven eight nine ten eleven twelve thirteen fourteen?",
            "same",
        ),
        (" ".join(["first", *WORDS]), "overlapping"),
        (" ".join(WORDS[:12] + ["x"] * 20), "overlapping"),  # 5 of the 7 grams: 71%
        (" ".join(WORDS[:11] + ["x"] * 20), None),  # 4 of 7
        (" ".join(WORDS[3:12]), "overlapping"),  # both grams of a short text
        (" ".join(WORDS[:7]), None),  # no gram at all
        (" ".join(reversed(WORDS)), None),
    ],
)
def test_the_share_of_grams_decides(text: str, found: str | None):
    assert len(WORDS) - GRAM + 1 == 7 and 4 / 7 < SHARE < 5 / 7
    assert ExamTexts([TEST]).find(text) == found


def test_a_short_question_is_found_as_a_whole():
    texts = ExamTexts([dataclasses.replace(TEST, text=" ".join(WORDS[:6])), TEST])
    assert texts.find(" ".join(["so", *WORDS[:6], "x"])) == "overlapping"
    assert texts.find(" ".join([*WORDS[:5], "x", *WORDS[5:8]])) is None
    assert texts.find(" ".join(WORDS[:6])) == "same"
    sums = ExamTexts([dataclasses.replace(TEST, text="2 + 3 = ?")])
    assert sums.find("First 2 + 3 = 5.") is None and sums.find("2+3=") == "same"


def test_grams_of_different_questions_do_not_add_up():
    halves = [dataclasses.replace(TEST, text=" ".join(part)) for part in (WORDS[:10], WORDS[3:])]
    other = [*WORDS[:9], "x", *WORDS[4:13], *["y"] * 30]
    assert ExamTexts(halves).find(" ".join(other)) is None
    assert ExamTexts([TEST]).find(" ".join([*WORDS[:10], "x"])) == "overlapping"


def test_generated_questions_are_hardly_ever_taken_for_one_another():
    made = make_questions(num_train=600, num_test=200, steps=[2, 3], max_value=10, seed=5)
    train = [question for question in made if question.split == "train"]
    texts = ExamTexts(question for question in made if question.split == "test")
    clean, found = texts.split(train)
    assert len(clean) + sum(map(len, found.values())) == 600
    assert found["same"] == [] and len(found["overlapping"]) <= 6
