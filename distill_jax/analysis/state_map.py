"""Where a student's right and wrong answers lie: the paper's figure 4, and numbers beside it.

A picture of t-SNE is no measure: silhouette and a linear probe are.

Letters: N texts, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from distill_jax.analysis.findings import Findings
from distill_jax.analysis.paths import Scores, gather_paths
from distill_jax.analysis.pooled import read_run
from distill_jax.analysis.reflection import read_with
from distill_jax.progress import Progress
from distill_jax.report.figures import letter
from distill_jax.report.style import colour, marker, new_figure, styled
from distill_jax.report.summary import row_name
from distill_jax.report.tables import Table

SEED = 42
PERPLEXITY = 30.0
FOLDS = 5
Array = np.ndarray


@dataclass(frozen=True, slots=True)
class StateMap:
    """The states of one student.

    Attributes:
      scores: The texts, as it reads them.
      places: Of each text, by t-SNE.
      silhouette: How much nearer a text is to its own sort than to the other, from -1 to 1.
      probe: The area under the curve of a linear probe that tells right from wrong, on questions
        that it has not been fitted to; 0.5 is guessing.
    """

    scores: Scores
    places: Float[Array, "N 2"]
    silhouette: float
    probe: float


def study_states(
    folders: Sequence[Path], *, limit: int = 200, round_index: int = -1, progress: Progress
) -> Findings:
    """Maps the last-token states of the first run's own answers, as each run's student reads them.

    Args:
      folders: Finished runs; the first gives the texts: its last exam on the training questions.
      limit: Questions, at most.
      round_index: Whose weights read; -1 takes each run's chosen round, 0 the untrained student.
      progress: Where to show it.

    Raises:
      ValueError: too few questions have right and wrong answers, or a folder holds no finished
        run.
    """
    paths = gather_paths(folders[0], right="student", limit=limit)
    if len(paths.questions) < FOLDS:
        raise ValueError(
            f"{folders[0]} has {len(paths.questions)} training questions with right and wrong "
            f"answers; at least {FOLDS} are needed."
        )
    maps: dict[str, StateMap] = {}
    with progress.stage("reading texts", total=len(folders), unit="students") as advance:
        for index, folder in enumerate(folders):
            chosen = read_run(folder).chosen_round if round_index < 0 else round_index
            maps[letter(index)] = map_states(read_with(folder, chosen, paths))
            advance(1)
    names = {letter(index): row_name(folder) for index, folder in enumerate(folders)}
    return Findings(
        tables=[_table(names, maps)],
        facts={
            "questions": len(paths.questions),
            "runs": [
                {
                    "run": str(folder),
                    "right": int(each.scores.right.sum()),
                    "wrong": int((~each.scores.right).sum()),
                    "silhouette": each.silhouette,
                    "probe_auc": each.probe,
                }
                for folder, each in zip(folders, maps.values(), strict=True)
            ],
        },
        figures={"states": states_figure(maps, names)},
    )


def map_states(scores: Scores) -> StateMap:
    """Places and measures of N states."""
    perplexity = min(PERPLEXITY, (len(scores.states) - 1) / 3)
    tsne = TSNE(2, perplexity=perplexity, init="pca", random_state=SEED)
    places = tsne.fit_transform(scores.states)
    return StateMap(scores, places, *measure_states(scores))


def measure_states(scores: Scores) -> tuple[float, float]:
    """The silhouette and the linear probe's area under the curve, as `StateMap` has them."""
    states, right = scores.states, scores.right
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    guesses = cross_val_predict(
        probe,
        states,
        right,
        groups=scores.question_ids,
        cv=GroupKFold(FOLDS),
        method="decision_function",
    )
    return float(silhouette_score(states, right)), float(roc_auc_score(right, guesses))


def _table(names: Mapping[str, str], maps: Mapping[str, StateMap]) -> Table:
    rows = tuple(
        (
            f"{key}: {names[key]}",
            f"{each.scores.right.sum():,}",
            f"{(~each.scores.right).sum():,}",
            f"{each.silhouette:.3f}",
            f"{each.probe:.3f}",
        )
        for key, each in maps.items()
    )
    note = (
        "Silhouette is by Euclidean distance of the states, and the probe's area under the curve "
        f"by {FOLDS}-fold cross-validation that keeps a question's answers together. All runs read "
        "the first one's answers."
    )
    columns = ("run", "right", "wrong", "silhouette", "linear probe, AUC")
    return Table("States of right and wrong answers", columns, rows, note)


@styled
def states_figure(maps: Mapping[str, StateMap], names: Mapping[str, str]) -> Figure:
    """A panel per run, two to a line: right and wrong answers by colour and marker."""
    lines = -(-len(maps) // 2)
    figure = new_figure(0.3 + 2.1 * lines)
    panels = figure.subplots(lines, min(2, len(maps)), squeeze=False).ravel()
    for panel, (key, each) in zip(panels, maps.items(), strict=False):
        for index, (label, side) in enumerate(
            (("right", each.scores.right), ("wrong", ~each.scores.right))
        ):
            panel.plot(
                *each.places[side].T,
                marker(index),
                color=colour(index),
                markersize=2.5,
                alpha=0.7,
                label=label,
                gid=f"{key}-{label}",
            )
        panel.set_title(f"{key}: {names[key]}", loc="left")
        panel.set_xticks([])
        panel.set_yticks([])
        panel.grid(visible=False)
    for panel in panels[len(maps) :]:
        panel.set_visible(False)
    panels[0].legend(loc="best")
    return figure
