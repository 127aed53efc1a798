"""Built-in word problems: a start, a few events, and how many there are in the end.

Every question comes from a seeded generator, with a worked solution of one sentence per step. All
numbers, given or worked out, are between 1 and `LARGEST`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product
from random import Random
from typing import NamedTuple

from distill_jax.records import Question, Split

LARGEST = 99
"""No number in a question or in its solution is larger."""

PEOPLE = (
    ("Tom", "he", "him"),
    ("Anna", "she", "her"),
    ("Ben", "he", "him"),
    ("Mia", "she", "her"),
    ("Sam", "he", "him"),
    ("Eva", "she", "her"),
    ("Leo", "he", "him"),
    ("Zoe", "she", "her"),
)
ITEMS = ("egg", "apple", "book", "card", "coin", "shell", "stamp", "marble")
CONTAINERS = ("bags", "boxes", "baskets")
EVENTS = (
    ("+", "{He} buys {some}."),
    ("+", "{He} finds {some}."),
    ("+", "A friend gives {him} {some}."),
    ("-", "{He} loses {some}."),
    ("-", "{He} sells {some}."),
    ("-", "{He} gives {some} to a friend."),
)
WORDINGS = Counter(sign for sign, _ in EVENTS)

LARGEST_FACTOR = 9  # products stay within the times table that a tiny student can learn


class Story(NamedTuple):
    """What happens to somebody's things, and the sums that follow it."""

    name: str
    item: str
    sentences: tuple[str, ...]  # one for the start, one per event
    sums: tuple[str, ...]  # equations that the last sentences lead to, one each
    result: int

    @property
    def text(self) -> str:
        """The story without a question."""
        return " ".join(self.sentences)

    @property
    def question(self) -> str:
        """The story with its question."""
        return f"{self.text} How many {self.item}s does {self.name} have now?"

    @property
    def solution(self) -> str:
        """One sentence per sum: what happens, and the equation."""
        steps = zip(self.sentences[-len(self.sums) :], self.sums, strict=True)
        return " ".join(_explained(sentence, equation) for sentence, equation in steps)


def make_questions(
    *, num_train: int, num_test: int, steps: Sequence[int], max_value: int, seed: int
) -> list[Question]:
    """Makes the arithmetic question set.

    Args:
      num_train: Train questions, dev not yet carved out of them.
      num_test: Test questions. No text occurs twice within or across splits, and the train
        questions are the same whatever this number is.
      steps: Solution lengths; each split takes them in turn, so the parts are equal but for one.
      max_value: The largest number that a question gives, at least 2. Sums may reach `LARGEST`.
      seed: The same seed gives the same questions on every machine.

    Returns:
      Train, then test. `group` is the length, such as `"2 steps"`; `solution` is one sentence per
      step, the last one ends in the answer.

    Raises:
      ValueError: fewer distinct questions exist than are asked for, or a length is below 1 or
        `max_value` below 2.

    Example:
      >>> question = make_questions(num_train=1, num_test=0, steps=[2], max_value=30, seed=3)[0]
      >>> question.text
      'Ben has 23 shells. He loses 14 shells. He sells 5 shells. How many shells does Ben have now?'
      >>> question.solution
      'He loses 14 shells: 23 - 14 = 9. He sells 5 shells: 9 - 5 = 4.'
    """
    if max_value < 2:
        raise ValueError(f"max_value is the largest number given, at least 2; got {max_value}.")
    if not steps or min(steps) < 1:
        raise ValueError(f"steps are solution lengths, each at least 1; got {list(steps)}.")
    lengths: dict[Split, list[int]] = {
        "train": [steps[i % len(steps)] for i in range(num_train)],
        "test": [steps[i % len(steps)] for i in range(num_test)],
    }
    for length, wanted in Counter(lengths["train"] + lengths["test"]).items():
        available = count_stories(num_steps=length, max_value=max_value)
        if wanted > available:
            raise ValueError(
                f"there are {available} arithmetic questions of {_steps(length)} with numbers up "
                f"to {max_value}; asked for {wanted}: raise max_value, or ask for fewer."
            )
    random = Random(f"arithmetic questions {seed}")
    seen: set[str] = set()
    questions = []
    for split, split_lengths in lengths.items():
        for i, length in enumerate(split_lengths):
            story = _draw_unseen(random, seen, num_steps=length, max_value=max_value)
            questions.append(_question(story, id=f"arithmetic/{split}/{i}", split=split))
    return questions


def count_stories(*, num_steps: int, max_value: int) -> int:
    """How many different stories `draw_story` can tell."""
    onward = [1] * (LARGEST + 1)  # ways to go on from each value, for a growing number of events
    for _ in range(num_steps - 1):
        onward = _one_event_more(onward, max_value)
    grouped = len(CONTAINERS) * sum(onward[a * b] for a, b in _factors(max_value))
    onward = _one_event_more(onward, max_value)
    plain = sum(onward[1 : min(max_value, LARGEST) + 1])
    return len(PEOPLE) * len(ITEMS) * (plain + grouped)


def draw_story(random: Random, *, num_steps: int, max_value: int) -> Story:
    """Draws a story whose result takes `num_steps` sums, each between 1 and `LARGEST`."""
    name, he, him = random.choice(PEOPLE)
    item = random.choice(ITEMS)
    if random.random() < 0.5:
        a, b = random.choice(_factors(max_value))
        value = a * b
        sentences = [_grouped(name, a, random.choice(CONTAINERS), b, item)]
        sums = [f"{a} * {b} = {value}"]
    else:
        value = random.randint(1, min(max_value, LARGEST))
        sentences, sums = [f"{name} has {_some(value, item)}."], []
    while len(sums) < num_steps:
        sign, template = random.choice([event for event in EVENTS if _room(event[0], value)])
        number = random.randint(1, min(max_value, _room(sign, value)))
        result = value + number if sign == "+" else value - number
        some = _some(number, item)
        sentences.append(template.format(He=he.capitalize(), him=him, some=some))
        sums.append(f"{value} {sign} {number} = {result}")
        value = result
    return Story(name, item, tuple(sentences), tuple(sums), value)


def wordings() -> Iterator[str]:
    """Every sentence that a story, its question or its solution can hold, but for the numbers.

    Example:
      >>> "She finds 2 coins." in set(wordings())
      True
    """
    for (name, he, him), item, number in product(PEOPLE, ITEMS, (1, 2)):
        some = _some(number, item)
        happens = [f"{name} has {some}."]
        happens += [_grouped(name, number, container, number, item) for container in CONTAINERS]
        happens += [text.format(He=he.capitalize(), him=him, some=some) for _, text in EVENTS]
        yield from happens
        yield from (_explained(text, f"2 {sign} 2 = 2") for text in happens for sign in "+-*")
        yield Story(name, item, (), (), number).question


def _one_event_more(onward: Sequence[int], max_value: int) -> list[int]:
    more = (sum(onward[value + 1 : value + max_value + 1]) for value in range(LARGEST + 1))
    fewer = (sum(onward[max(1, value - max_value) : value]) for value in range(LARGEST + 1))
    return [WORDINGS["+"] * m + WORDINGS["-"] * f for m, f in zip(more, fewer, strict=True)]


def _draw_unseen(random: Random, seen: set[str], *, num_steps: int, max_value: int) -> Story:
    while True:
        story = draw_story(random, num_steps=num_steps, max_value=max_value)
        if story.text not in seen:
            seen.add(story.text)
            return story


def _question(story: Story, *, id: str, split: Split) -> Question:
    return Question(
        id=id,
        text=story.question,
        answer=str(story.result),
        split=split,
        kind="numeric",
        solution=story.solution,
        group=_steps(len(story.sums)),
    )


def _factors(max_value: int) -> list[tuple[int, int]]:
    numbers = range(2, min(max_value, LARGEST_FACTOR) + 1)
    return list(product(numbers, numbers))


def _room(sign: str, value: int) -> int:
    """The largest number that can be added to `value`, or taken from it."""
    return LARGEST - value if sign == "+" else value - 1


def _grouped(name: str, groups: int, container: str, each: int, item: str) -> str:
    return f"{name} has {groups} {container} with {each} {item}s each."


def _explained(sentence: str, equation: str) -> str:
    return f"{sentence[:-1]}: {equation}."


def _some(number: int, item: str) -> str:
    return f"{number} {item}" if number == 1 else f"{number} {item}s"


def _steps(length: int) -> str:
    return f"{length} step" if length == 1 else f"{length} steps"
