"""The exam's bookkeeping: every question once, every answer marked, nothing dropped."""

from collections.abc import Collection, Iterator, Sequence

import pytest

from distill_jax.exam import accuracy, passes, take_exam, vote
from distill_jax.records import Attempt, Completion, Question

QUESTIONS = [
    Question("t/1", "3 + 4?", "7", "train", "numeric"),
    Question("t/2", "Which?", "b", "train", "choice", ("x", "y")),
    Question("t/3", "Is it?", "Yes", "train", "yes_no"),
]

SAID = {
    "t/1": [
        Completion("3 and 4 make 7.\nAnswer: 7.0", "stop", 12),
        Completion("\nAnswer: 8", "stop", 5),
        Completion("I do not know", "stop", 4),
    ],
    "t/2": [
        Completion("Therefore, the answer is y (b).", "stop", 9),
        Completion("Therefore, the answer is y (b). And", "length", 10),
        Completion("Therefore, the ans", "length", 10),
    ],
    "t/3": [
        Completion("\nAnswer: No", "stop", 3),
        Completion("\nAnswer: Yes", "stop", 3),
        Completion("", "length", 0),
    ],
}


def says(
    prompts: Sequence[str], ids: Sequence[str], *, done: Collection[int]
) -> Iterator[tuple[int, Sequence[Completion]]]:
    """Answers in reverse order, as batches sorted by length may."""
    assert list(prompts) == [f"Question: {question.text}" for question in QUESTIONS]
    for index in reversed(range(len(ids))):
        if index not in done:
            yield index, SAID[ids[index]]


def sit(generate=says, done: Collection[str] = ()) -> dict[str, list[Attempt]]:
    exam = take_exam(
        QUESTIONS, generate, prompt=lambda q: f"Question: {q.text}", round_index=3, done=done
    )
    return {attempts[0].question_id: attempts for attempts in exam}


def test_every_completion_becomes_a_marked_attempt():
    found = sit()
    assert list(found) == ["t/3", "t/2", "t/1"]
    for name, attempts in found.items():
        assert [attempt.sample_index for attempt in attempts] == [0, 1, 2]
        assert [attempt.text for attempt in attempts] == [said.text for said in SAID[name]]
        assert [attempt.num_tokens for attempt in attempts] == [c.num_tokens for c in SAID[name]]
        assert {(attempt.question_id, attempt.round_index) for attempt in attempts} == {(name, 3)}
    assert [(a.answer, a.correct) for a in found["t/1"]] == [
        ("7", True),
        ("8", False),
        (None, False),
    ]
    assert [(a.answer, a.correct) for a in found["t/3"]] == [
        ("No", False),
        ("Yes", True),
        (None, False),
    ]


def test_a_cut_text_is_marked_by_what_can_be_read_and_counted_apart():
    whole, cut, unreadable = sit()["t/2"]
    assert (whole.correct, whole.cut) == (True, False)
    assert (cut.answer, cut.correct, cut.cut) == ("b", True, True)
    assert (unreadable.answer, unreadable.correct, unreadable.cut) == (None, False, True)


def test_what_is_done_is_left_out_but_still_handed_to_generate():
    assert list(sit(done={"t/2"})) == ["t/3", "t/1"]
    assert sit(done={"t/1", "t/2", "t/3"}) == {}


def test_ids_must_be_distinct_and_known():
    twice = [QUESTIONS[0], QUESTIONS[0]]
    with pytest.raises(ValueError, match=r"'t/1' is there twice"):
        take_exam(twice, says, prompt=lambda q: q.text, round_index=0)
    with pytest.raises(ValueError, match=r"'t/9', which is not among"):
        take_exam(QUESTIONS, says, prompt=lambda q: q.text, round_index=0, done={"t/9"})


def test_a_question_left_out_or_answered_twice_is_an_error():
    with pytest.raises(ValueError, match=r"left out 2 questions, such as 't/1'"):
        sit(lambda prompts, ids, *, done: [(1, SAID["t/2"])])
    with pytest.raises(ValueError, match=r"'t/2', which it does not owe"):
        sit(lambda prompts, ids, *, done: [(1, SAID["t/2"]), (1, SAID["t/2"])])
    with pytest.raises(ValueError, match=r"'t/2', which it does not owe"):
        sit(lambda prompts, ids, *, done: [(1, SAID["t/2"])], done={"t/2"})


def test_accuracy_counts_greedy_answers_only():
    attempts = [attempt for row in sit().values() for attempt in row]
    assert accuracy(attempts) == 2 / 3
    with pytest.raises(ValueError, match="at least one greedy attempt"):
        accuracy(attempt for attempt in attempts if attempt.sample_index)


def samples(*said: tuple[str | None, bool]) -> list[Attempt]:
    """A greedy attempt that is wrong, then one for each answer and whether it is right."""
    rows = enumerate((("9", False), *said))
    return [Attempt("t/1", 0, i, "", answer, right, False, 5) for i, (answer, right) in rows]


@pytest.mark.parametrize(
    ("said", "agreed", "passed"),
    [
        ([("7", True), ("8", False), ("7.0", True)], True, True),
        ([("8", False), ("7", True), ("8", False)], False, True),
        ([("7", True), ("8", False)], True, True),  # the first of two as strong
        ([("8", False), ("7", True)], False, True),
        ([(None, False), (None, False), ("7", True)], True, True),
        ([(None, False)], False, False),
        ([("9", False), ("8", False)], False, False),
        ([], False, False),
    ],
)
def test_samples_vote_by_what_their_answers_mean(said, agreed, passed):
    assert vote(samples(*said), "numeric").correct is agreed
    assert passes(samples(*said)) is passed


def test_the_greedy_answer_neither_votes_nor_passes():
    right = Attempt("t/1", 0, 0, "", "7", correct=True, cut=False, num_tokens=5)
    assert not vote([right, *samples(("8", False))[1:]], "numeric").correct
    assert vote([right, *samples((None, False))[1:]], "numeric").answer is None
    assert not passes([right, *samples(("8", False))[1:]])
