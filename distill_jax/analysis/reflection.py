"""Distance and preference of right and wrong reasoning: the paper's table 4.

The paper says what it measures in a sentence each and its code has neither, so several definitions
stand side by side.

Letters: N texts, D width.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distill_jax.analysis.findings import Findings
from distill_jax.analysis.paired import bootstrap
from distill_jax.analysis.paths import Paths, Scores, gather_paths, score_paths
from distill_jax.analysis.pooled import read_run
from distill_jax.progress import Progress
from distill_jax.report.figures import letter
from distill_jax.report.headline import NOT_KNOWN
from distill_jax.report.published import TABLE_4
from distill_jax.report.summary import row_name
from distill_jax.report.tables import Table
from distill_jax.school import find_base, open_student

Array = np.ndarray
Measure = Callable[[Array, Array, Array, Array], float]

PAPER = {"distance": "distance", "likelihood ratio": "preference"}
"""Which of ours the paper's two are taken to be."""


def study_reflection(
    folders: Sequence[Path], *, limit: int = 200, round_index: int = -1, progress: Progress
) -> Findings:
    """How far apart students hold right and wrong reasoning, and which they find likelier.

    All students read the same texts: the right ones are the first run's kept rationales, the wrong
    ones its student's samples in its last exam on the training questions.

    Args:
      folders: Finished runs; the first gives the texts.
      limit: Questions, at most.
      round_index: Whose weights read; -1 takes each run's chosen round, 0 the untrained student.
      progress: Where to show it.

    Raises:
      ValueError: no question has both sorts of text, or a folder holds no finished run.
    """
    runs = [read_run(folder) for folder in folders]
    paths = gather_paths(folders[0], right="teacher", limit=limit)
    measured = []
    with progress.stage("reading texts", total=len(runs), unit="students") as advance:
        for run in runs:
            chosen = run.chosen_round if round_index < 0 else round_index
            measured.append(measure(read_with(run.folder, chosen, paths)))
            advance(1)
    names = [row_name(run.folder) for run in runs]
    task = runs[0].config.task.name
    return Findings(
        tables=[_table(names, measured, task)],
        facts={
            "questions": len(paths.questions),
            "right": len(paths.right),
            "wrong": len(paths.wrong),
            "runs": [
                {"run": str(folder), "measures": {k: _mean(v) for k, v in each.items()}}
                for folder, each in zip(folders, measured, strict=True)
            ],
            "against_first": [_differences(measured[0], each) for each in measured[1:]],
        },
        notes=[
            f"{len(paths.right):,} right and {len(paths.wrong):,} wrong texts of "
            f"{len(paths.questions):,} training questions of {names[0]}."
        ],
    )


def read_with(folder: Path, round_index: int, paths: Paths) -> Scores:
    """What the student of a run's round makes of the texts."""
    config = read_run(folder).config
    student = open_student(config, find_base(config, folder), folder)
    return score_paths(config, student, student.weights.get(round_index), paths)


def measure(scores: Scores) -> dict[str, dict[str, float]]:
    """Every definition, for each question that has right and wrong texts."""
    names = np.array(scores.question_ids)
    found: dict[str, dict[str, float]] = {name: {} for name in MEASURES}
    for question in dict.fromkeys(scores.question_ids):
        right, wrong = ((names == question) & (scores.right == side) for side in (True, False))
        if right.any() and wrong.any():
            sides = [
                values[side]
                for values in (scores.states, scores.likelihoods)
                for side in (right, wrong)
            ]
            for name, formula in MEASURES.items():
                found[name][question] = float(formula(*sides))
    return found


def _lengths(x: Array, y: Array, *_: Array) -> float:
    return float(np.mean(np.linalg.norm(x[:, None] - y[None], axis=-1)))


def _relative(x: Array, y: Array, *_: Array) -> float:
    both = np.linalg.norm(np.concatenate([x, y]), axis=-1)
    return _lengths(x, y) / float(np.mean(both))


def _centres(x: Array, y: Array, *_: Array) -> float:
    return float(np.linalg.norm(np.mean(x, axis=0) - np.mean(y, axis=0)))


def _cosine(x: Array, y: Array, *_: Array) -> float:
    x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
    return float(np.mean(1 - x @ y.T))


def _gaps(right: Array, wrong: Array) -> Array:
    return right[:, None] - wrong[None]


MEASURES: Mapping[str, Measure] = {
    "distance": _lengths,
    "distance over length": _relative,
    "distance of means": _centres,
    "cosine distance": _cosine,
    "likelihood ratio": lambda _x, _y, r, w: 100 * float(np.mean(np.exp(_gaps(r, w)))),
    "right is likelier": lambda _x, _y, r, w: 100 * float(np.mean(_gaps(r, w) > 0)),
    "sigmoid of the gap": lambda _x, _y, r, w: 100 * float(np.mean(1 / (1 + np.exp(-_gaps(r, w))))),
}
"""Each a mean over all pairs of a right and a wrong text of one question. Distances are those of
the states at the last token after the final norm, Euclidean but for the cosine's; the next one is
over the mean length of these states. Likelihoods are those of a token, the geometric mean over a
text; the last three are in percent."""


def _mean(values: Mapping[str, float]) -> float:
    return float(np.mean(list(values.values())))


def _differences(
    first: Mapping[str, Mapping[str, float]], other: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    found = {}
    for name in MEASURES:
        gaps = {key: other[name][key] - value for key, value in first[name].items()}
        found[name] = {"difference": _mean(gaps), "interval": list(bootstrap([gaps]))}
    return found


def _table(
    names: Sequence[str], measured: Sequence[Mapping[str, Mapping[str, float]]], task: str
) -> Table:
    against = [_differences(measured[0], each) for each in measured[1:]]
    rows = []
    for name in MEASURES:
        told = TABLE_4.get(task, {}).get(PAPER.get(name, ""))
        rows.append(
            (
                name,
                *(f"{_mean(each[name]):.4g}" for each in measured),
                *(_gap_words(each[name]) for each in against),
                NOT_KNOWN if told is None else f"{told[0]:.2f} / {told[1]:.2f}",
            )
        )
    letters = [letter(index) for index in range(len(names))]
    columns = (
        "measure",
        *(f"{place}: {name}" for place, name in zip(letters, names, strict=True)),
        *(f"{place} - A" for place in letters[1:]),
        "paper: without / with",
    )
    note = (
        "Means over questions of means over pairs; intervals of the paired bootstrap over "
        "questions. Right texts are the teacher's, wrong ones the student's own; all runs read the "
        "same ones. The last three rows are in percent."
    )
    return Table("Right and wrong reasoning", columns, tuple(rows), note)


def _gap_words(found: Mapping[str, Any]) -> str:
    low, high = found["interval"]
    return f"{found['difference']:+.3g} ({low:.3g} to {high:.3g})"
