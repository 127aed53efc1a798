"""The lesson: which answers are trained on, and the counts of all others."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill_jax.prompts import feedback_prompt
from distill_jax.records import Completion, FinishReason, Lesson, Question
from distill_jax.teacher.lesson import ask_teacher

TOM = Question("t/1", "Tom has 5 eggs and finds 3. How many?", "8", "train", "numeric")
INK = Question("t/2", "What absorbs ink?", "b", "train", "choice", choices=("inkwell", "blotter"))


def said(text: str, finish_reason: FinishReason = "stop") -> Completion:
    return Completion(text, finish_reason, 9)


def teach(questions, answers, mistakes=None, shown=None):
    def complete(asks):
        if shown is not None:
            shown.extend(ask.prompt for ask in asks if not ask.longer)
        if asks and asks[0].longer:  # what was cut stays cut
            return [[Completion("", "error", 0)] * len(ask.slots) for ask in asks]
        return answers

    return Lesson(
        tuple(
            ask_teacher(
                questions,
                mistakes or {},
                complete,
                prompt=lambda question, mistake: feedback_prompt(
                    question, mistake=mistake, hint=True, demonstrations=""
                ),
                round_index=2,
                samples=len(answers[0]) if answers else 1,
            )
        )
    )


def test_every_verdict():
    answers = [
        said("5 + 3 = 8.\nAnswer: 8"),
        said("5  + 3 =\n8.\nAnswer: 8.0"),
        said("First, 5 eggs.\n\nSo Tom has 5 + 3 = 8 eggs.\nAnswer: 8"),
        said("5 + 3 = 9.\nAnswer: 9"),
        said("I would rather not."),
        said("5 + 3 = 8.\nAnswer: 8", "length"),
        said("", "error"),
        said("", "content_filter"),
        said("Answer: 8"),
    ]
    lesson = teach([TOM], [answers])
    assert [row.verdict for row in lesson.rows] == [
        "kept", "duplicate", "kept", "wrong", "unreadable", "cut", "failed", "failed", "unreadable",
    ]  # fmt: skip
    assert [row.text for row in lesson.kept] == [
        "5 + 3 = 8.",
        "First, 5 eggs. So Tom has 5 + 3 = 8 eggs.",
    ]
    assert lesson.num_asked == len(answers) == len(lesson.kept) + sum(lesson.rejected.values())
    assert [row.sample_index for row in lesson.rows] == list(range(9))
    assert {(row.question_id, row.round_index) for row in lesson.rows} == {("t/1", 2)}
    assert lesson.rows[3].answer == "9" and lesson.rows[5].answer is None


def test_a_repeated_wrong_answer_does_not_hide_a_right_one():
    lesson = teach([TOM], [[said("It is so.\nAnswer: 9"), said("It is so.\nAnswer: 8")]])
    assert [row.verdict for row in lesson.rows] == ["wrong", "kept"]


def test_the_same_words_for_two_questions_are_no_duplicates():
    twin = dataclasses.replace(TOM, id="t/3")
    answers = [[said("So it is 8.\nAnswer: 8")]] * 2
    lesson = teach([TOM, twin], answers)
    assert [row.question_id for row in lesson.kept] == ["t/1", "t/3"]


def test_choice_keeps_its_conclusion():
    text = "A blotter soaks up ink. Therefore, the answer is blotter (b)."
    lesson = teach([INK], [[said(text), said(text.replace("blotter (b)", "inkwell (a)"))]])
    assert [row.text for row in lesson.kept] == [text]
    assert lesson.rejected == {"wrong": 1}


def test_each_question_gets_its_own_prompt():
    shown = []
    mistakes = {"t/2": "Ink is kept in inkwells. Therefore, the answer is inkwell (a)."}
    teach([TOM, INK], [[said("x")], [said("x")]], mistakes, shown)
    assert [("Wrong Solution:" in prompt) for prompt in shown] == [False, True]
    assert "inkwells" in shown[1]


@pytest.mark.parametrize(
    ("questions", "mistakes", "message"),
    [
        (
            [TOM, dataclasses.replace(INK, split="dev")],
            {},
            "train questions only; t/2 is of the dev",
        ),
        ([dataclasses.replace(TOM, split="test")], {}, "train questions only; t/1 is of the test"),
        ([TOM, TOM], {}, "asked once; t/1 was given 2x"),
        ([TOM], {"t/2": "wrong"}, "needs its question; t/2 is not among them"),
    ],
)
def test_refused_before_anything_is_asked(questions, mistakes, message):
    shown = []
    with pytest.raises(ValueError, match=message):
        teach(questions, [], mistakes, shown)
    assert shown == []


@given(st.lists(st.lists(st.tuples(st.text(), st.sampled_from(["stop", "length", "error"])),
                         min_size=3, max_size=3), min_size=1, max_size=4))  # fmt: skip
def test_whatever_comes_back_the_counts_add_up(texts):
    questions = [dataclasses.replace(TOM, id=f"t/{i}") for i in range(len(texts))]
    lesson = teach(questions, [[said(text, reason) for text, reason in row] for row in texts])
    assert lesson.num_asked == 3 * len(texts)
    assert lesson.num_asked == len(lesson.kept) + sum(lesson.rejected.values())


WRONG = "Tom has 5 eggs and finds 3 more, so he has 9 eggs.\nAnswer: 9"


@pytest.mark.parametrize(
    ("text", "leak"),
    [
        ("5 + 3 = 8.", False),
        ("The answer is given as 8, so 5 + 3 = 8.", True),
        ("As the hint says, Tom has 8.", True),
        ("We know the expected answer, which is 8.", True),
        ("The final answer should be 8, because 5 + 3 = 8.", True),
        ("So, the answer is 8. Indeed 5 + 3 = 8.", True),
        ("The correct answer is 8, for 5 + 3 = 8.", True),
        ("8. Because 5 + 3 = 8.", True),
        ("8 is what 5 + 3 makes.", False),
        ("5 + 3 = 8. Therefore, the answer is 8.", False),
        ("The student says: tom has 5 eggs and finds 3 more, so he has 9 eggs! No: 8.", True),
        ("Tom has 5 eggs and finds 3 more, so he has 9 eggs? No, 8.", False),  # goes on from it
        ("He finds 3 more, so he has 8 eggs.", False),
    ],
)
def test_what_gives_the_answer_or_the_mistake_away(text: str, leak: bool):
    lesson = teach([TOM], [[said(f"{text}\nAnswer: 8")]], {"t/1": WRONG})
    assert [row.verdict for row in lesson.rows] == ["leak" if leak else "kept"]


def test_a_question_about_hints_may_be_answered_with_the_word():
    about = dataclasses.replace(TOM, text="A game gives 5 hints, then 3 hints. How many hints?")
    lesson = teach([about], [[said("5 hints + 3 hints = 8 hints.\nAnswer: 8")]])
    assert len(lesson.kept) == 1


def test_rationales_that_differ_in_marks_and_case_alone_are_one():
    texts = ["So 5 + 3 = 8!", "so 5 + 3 = 8", "So 5 + 3 = 8, eggs.", "So 5 - 3 = 8!"]
    lesson = teach([TOM], [[said(f"{text}\nAnswer: 8") for text in texts]])
    assert [row.verdict for row in lesson.rows] == ["kept", "duplicate", "kept", "kept"]
