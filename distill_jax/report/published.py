"""The numbers that Wang et al. published, to stand beside ours. Accuracies are percentages.

Source:
  Wang et al., "Democratizing Reasoning Ability: Tailored Learning from Large Language Model"
  (EMNLP 2023). Rows with a star there were copied by its authors from the papers of others; the
  values of figure 5 are read off the figure's own text.
"""

from collections.abc import Mapping
from dataclasses import dataclass

TASKS = ("gsm8k", "multiarith", "svamp", "csqa", "strategyqa")


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """A row of table 1.

    Attributes:
      name: What the paper calls it.
      accuracy: On the test questions of each task in `TASKS`; None where the paper has none.
      copied: Tasks whose number its authors took from another paper, with another student, other
        questions or other marking.
    """

    name: str
    accuracy: tuple[float | None, ...]
    copied: tuple[str, ...] = ()


TABLE_1: Mapping[str, PublishedRow] = {
    "teacher": PublishedRow("Teacher LLM", (62.2, 95.5, 78.0, 76.0, 68.6)),
    "student": PublishedRow("Student without fine-tuning", (2.7, 9.0, 20.7, 34.5, 47.2)),
    "answer_only": PublishedRow("Student, answers only", (7.2, 18.0, 32.3, 66.7, 63.9)),
    "star": PublishedRow("STaR", (10.7, 53.9, 26.7, 72.5, 60.0), ("gsm8k", "csqa")),
    "adapter": PublishedRow(
        "LLM-Adapter", (10.6, 79.2, 45.0, None, None), ("gsm8k", "multiarith", "svamp")
    ),
    "specializing": PublishedRow(
        "Specializing", (27.1, 63.0, 35.6, None, None), ("gsm8k", "multiarith", "svamp")
    ),
    "cot_fine_tuned": PublishedRow(
        "CoT fine-tuned", (18.4, None, None, None, 63.8), ("gsm8k", "strategyqa")
    ),
    "one_round": PublishedRow("One-round distillation", (15.6, 81.5, 47.7, 68.1, 63.8)),
    "multi_round": PublishedRow("+ multi-round", (32.0, 83.1, 51.3, 70.2, 65.5)),
    "self_reflection": PublishedRow("+ self-reflection", (33.1, 85.4, 55.0, 71.3, 65.9)),
}
"""By a short name. Multi-round on gsm8k is round 4, on the others round 2."""


@dataclass(frozen=True, slots=True)
class PublishedFeedback:
    """A task in table 3: round 2 asked with and without the student's mistake."""

    requests: int
    successes: tuple[int, int]  # with, without
    accuracy: tuple[float, float]


TABLE_3: Mapping[str, PublishedFeedback] = {
    "gsm8k": PublishedFeedback(5701, (5250, 4641), (28.2, 26.5)),
    "svamp": PublishedFeedback(168, (166, 140), (51.3, 48.3)),
    "strategyqa": PublishedFeedback(328, (317, 134), (65.5, 63.9)),
}

TABLE_4: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "gsm8k": {"distance": (51.00, 65.08), "preference": (73.63, 79.11)},
    "strategyqa": {"distance": (5.03, 24.78), "preference": (96.54, 98.91)},
}
"""Without and with self-reflection."""


@dataclass(frozen=True, slots=True)
class PublishedRound:
    """A round in table 5.

    Attributes:
      rows: Rationales trained on, in thousands; None where not told.
      error_rate: On the training questions, after the round.
      gain: Of test accuracy; the accuracy itself in round 0.
    """

    rows: float | None
    error_rate: float
    gain: float


TABLE_5: Mapping[str, tuple[PublishedRound, ...]] = {
    "gsm8k": (
        PublishedRound(None, 98.3, 2.7),
        PublishedRound(15.0, 76.3, 12.9),
        PublishedRound(16.0, 66.2, 12.6),
        PublishedRound(13.0, 49.2, 2.4),
        PublishedRound(None, 51.8, 1.4),
    ),
    "svamp": (
        PublishedRound(None, 76.0, 20.7),
        PublishedRound(2.0, 24.0, 27.0),
        PublishedRound(0.6, 16.7, 3.6),
        PublishedRound(0.3, 17.6, 1.0),
    ),
    "csqa": (
        PublishedRound(None, 67.8, 34.5),
        PublishedRound(26.0, 18.9, 31.8),
        PublishedRound(7.0, 7.6, 3.9),
        PublishedRound(3.0, 9.2, -0.6),
    ),
}
"""By round, from 0. The last round of gsm8k is told in the text."""

TABLE_6: Mapping[str, tuple[tuple[float, float], ...]] = {
    "gsm8k": ((2.59, 1.02), (4.50, 1.15), (4.88, 1.26)),
    "svamp": ((4.53, 1.07), (4.86, 1.09), (4.90, 1.11)),
    "csqa": ((4.44, 1.24), (4.84, 1.41), (4.96, 1.55)),
}
"""By round, from 0: GPT-4's mean score of right and of wrong rationales, from 1 to 5."""

TABLE_7: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "T5-Large": {
        "student": (0.0, 0.0),
        "distillation": (11.0, 62.0),
        "self_reflection": (14.7, 64.0),
        "multi_round": (15.3, 64.8),
    },
    "GPT-2 Large": {
        "student": (2.7, 39.6),
        "distillation": (13.3, 62.2),
        "self_reflection": (15.3, 64.2),
        "multi_round": (17.0, 62.4),
    },
    "OPT-IML 1.3B": {
        "student": (5.3, 51.2),
        "distillation": (31.7, 62.0),
        "self_reflection": (32.0, 64.8),
        "multi_round": (35.0, 65.8),
    },
    "GPT-Neo 2.7B": {
        "student": (3.7, 38.9),
        "distillation": (34.3, 62.2),
        "self_reflection": (36.3, 65.2),
        "multi_round": (36.0, 63.8),
    },
}
"""By student and stage, each on top of the one before: svamp, strategyqa."""

TABLE_11: Mapping[str, tuple[float, ...]] = {
    "none": (2.7, 9.0, 20.7, 34.5, 47.2),
    "gsm8k first": (15.6, 46.6, 25.3, 28.4, 38.3),
    "gsm8k last": (32.0, 80.3, 42.3, 30.0, 38.3),
    "multiarith first": (4.7, 81.5, 14.7, 32.3, 52.5),
    "multiarith last": (5.0, 83.1, 19.3, 31.4, 52.1),
    "svamp first": (4.0, 12.4, 47.7, 29.6, 45.4),
    "svamp last": (5.4, 14.6, 51.3, 34.0, 44.7),
    "csqa first": (2.6, 5.1, 12.3, 68.1, 48.0),
    "csqa last": (2.3, 5.1, 14.3, 70.2, 51.1),
    "strategyqa first": (3.8, 9.0, 19.0, 33.3, 63.8),
    "strategyqa last": (9.6, 9.6, 17.3, 33.5, 65.5),
}
"""By the task and round that the student was taught: examined on each task in `TASKS`."""

FIGURE_5: Mapping[str, Mapping[float, float]] = {
    "multiarith": {0.0: 82.0, 0.25: 84.9, 0.5: 82.2, 0.75: 79.2, 1.0: 77.2},
    "strategyqa": {0.0: 63.6, 0.25: 64.9, 0.5: 64.1, 0.75: 64.6, 1.0: 64.1},
}
"""By reflection weight, after one round."""


def published_accuracy(row: str, task: str) -> float | None:
    """A row's accuracy on a task in table 1; None if the paper has none.

    Example:
      >>> published_accuracy("one_round", "svamp"), published_accuracy("one_round", "arithmetic")
      (47.7, None)
    """
    if row not in TABLE_1 or task not in TASKS:
        return None
    return TABLE_1[row].accuracy[TASKS.index(task)]


def published_words(row: str, task: str) -> str | None:
    """The same for readers, with a star where its authors copied it from another paper.

    Example:
      >>> published_words("star", "gsm8k"), published_words("star", "svamp")
      ('10.7%*', '26.7%')
    """
    accuracy = published_accuracy(row, task)
    if accuracy is None:
        return None
    return f"{accuracy:.1f}%" + "*" * (task in TABLE_1[row].copied)


def published_row(name: str) -> str:
    """The row of table 1 that a run's name begins with, or `""`; the longest such row.

    Example:
      >>> published_row("one_round_svamp"), published_row("self-reflection/seed=1")
      ('one_round', 'self_reflection')
    """
    plain = name.replace("-", "_")
    return max((row for row in TABLE_1 if plain.startswith(row)), key=len, default="")
