"""The built-in questions: checked by reading their English, not by asking their generator."""

import re
from collections import Counter
from random import Random

import pytest

from distill_jax.questions import arithmetic
from distill_jax.questions.arithmetic import (
    LARGEST,
    PEOPLE,
    count_stories,
    draw_story,
    make_questions,
    wordings,
)
from distill_jax.records import Question

STEPS = (2, 3, 4)
FIRST = (
    "Sam has 7 coins. He gives 3 coins to a friend. He buys 9 coins. He buys 28 coins. "
    "He sells 27 coins. How many coins does Sam have now?"
)
START = re.compile(r"(\w+) has (\d+) (?:(?:bags|boxes|baskets) with (\d+) )?\w+(?: each)?")
GAIN = re.compile(r"(?:He|She) (?:buys|finds) (\d+) \w+|A friend gives (?:him|her) (\d+) \w+")
LOSS = re.compile(r"(?:He|She) (?:loses|sells) (\d+) \w+|(?:He|She) gives (\d+) \w+ to a friend")


def read_story(text: str) -> tuple[list[int], list[int]]:
    """The numbers that a question gives, and what there is after each of its sums."""
    start, *events = text.rstrip("?").split(". ")[:-1]
    found = START.fullmatch(start)
    assert found, start
    given = [int(number) for number in found.groups()[1:] if number]
    value = given[0] * given[1] if len(given) == 2 else given[0]
    values = [value] if len(given) == 2 else []
    for event in events:
        gain, loss = GAIN.fullmatch(event), LOSS.fullmatch(event)
        assert (gain is None) != (loss is None), event
        number = int(next(n for n in (gain or loss).groups() if n))  # pyright: ignore
        value += number if gain else -number
        given.append(number)
        values.append(value)
    return given, values


def read_solution(solution: str) -> list[int]:
    """The results of a solution's equations, each checked."""
    results = []
    for sentence in solution.rstrip(".").split(". "):
        left, sign, right, result = re.search(r"(\d+) ([-+*]) (\d+) = (\d+)", sentence).groups()  # pyright: ignore
        value = {
            "+": int(left) + int(right),
            "-": int(left) - int(right),
            "*": int(left) * int(right),
        }[sign]
        assert value == int(result), sentence
        assert not results or results[-1] == int(left), "a step starts from the last result"
        results.append(value)
    return results


def make(num_train: int = 300, num_test: int = 60, seed: int = 5, **changes) -> list[Question]:
    settings = {"steps": STEPS, "max_value": 30} | changes
    return make_questions(num_train=num_train, num_test=num_test, seed=seed, **settings)


@pytest.mark.parametrize("max_value", [2, 30, 99])
def test_every_answer_is_what_the_story_says(max_value: int):
    for question in make(max_value=max_value):
        given, values = read_story(question.text)
        assert read_solution(question.solution) == values
        assert question.answer == str(values[-1])
        assert re.findall(r"\d+", question.solution)[-1] == question.answer
        assert question.group == f"{len(values)} steps"
        assert min(given) >= 1 and max(given) <= max_value
        assert min(values) >= 1 and max(values) <= LARGEST


def test_same_seed_same_questions_and_train_does_not_depend_on_test():
    assert make(seed=7) == make(seed=7)
    assert make(seed=7) != make(seed=8)
    train = [question for question in make(num_test=60) if question.split == "train"]
    assert train == make(num_test=0)


def test_the_questions_of_a_seed_never_change():
    first = make_questions(num_train=1, num_test=0, steps=(4,), max_value=30, seed=42)[0]
    assert first.text == FIRST, (
        "the generator changed, so runs that were started before can't be continued: "
        "if that is meant, update FIRST and say so in the release notes"
    )


def test_texts_and_ids_are_distinct_over_both_splits():
    questions = make(num_train=900, num_test=300, max_value=3)
    assert len({question.text for question in questions}) == 1200
    assert len({question.id for question in questions}) == 1200
    assert Counter(question.split for question in questions) == {"train": 900, "test": 300}


def test_lengths_come_in_equal_parts_in_each_split():
    groups = Counter((question.split, question.group) for question in make(300, 60))
    assert groups == {
        (split, f"{steps} steps"): number // 3
        for split, number in (("train", 300), ("test", 60))
        for steps in STEPS
    }
    one = make(4, 0, steps=(1, 2))
    assert [question.group for question in one] == ["1 step", "2 steps", "1 step", "2 steps"]


@pytest.mark.parametrize("num_steps, max_value", [(1, 2), (1, 4), (2, 2)])
def test_the_count_of_stories_is_exact(monkeypatch, num_steps: int, max_value: int):
    """Drawing long enough finds as many different stories as are counted, and never one more."""
    monkeypatch.setattr(arithmetic, "PEOPLE", PEOPLE[1:3])
    monkeypatch.setattr(arithmetic, "ITEMS", ("egg",))
    random = Random(0)
    counted = count_stories(num_steps=num_steps, max_value=max_value)
    stories = (
        draw_story(random, num_steps=num_steps, max_value=max_value) for _ in range(40 * counted)
    )
    assert len({story.text for story in stories}) == counted


def test_all_questions_there_are_can_be_made_and_one_more_is_refused():
    there = count_stories(num_steps=1, max_value=2)
    questions = make(there - 10, 10, steps=(1,), max_value=2)
    assert len({question.text for question in questions}) == there
    with pytest.raises(
        ValueError, match=rf"there are {there} .* 1 step .* up to 2; .* {there + 1}"
    ):
        make(there - 9, 10, steps=(1,), max_value=2)


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="at least 2; got 1"):
        make(max_value=1)
    with pytest.raises(ValueError, match=r"each at least 1; got \[2, 0\]"):
        make(steps=(2, 0))
    with pytest.raises(ValueError, match=r"got \[\]"):
        make(steps=())


def test_wordings_hold_every_word_of_questions_and_solutions():
    known = set(re.findall(r"[^\s\d]+", " ".join(wordings())))
    questions = make(500)
    used = " ".join(f"{question.text} {question.solution}" for question in questions)
    assert set(re.findall(r"[^\s\d]+", used)) == known
