"""The commands that read finished runs: comparisons, sweeps, and the analyses of the paper."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distill_jax.machine import keep_compiled
from distill_jax.run_arguments import RunFolder, RunFolders, folder_here

if TYPE_CHECKING:
    from distill_jax.analysis.findings import Findings

analyse = typer.Typer(no_args_is_help=True, help="The paper's analyses, on finished runs.")

To = Annotated[
    Path | None,
    typer.Option(help="A folder for tables and figures; the first run's `analysis` if left out."),
]
Number = Annotated[int, typer.Option(min=1, help="Questions, evenly spaced.")]
Round = Annotated[
    int, typer.Option("--round", help="Whose weights read; -1: each run's chosen round.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _put(findings: "Findings", folder: Path, name: str, as_json: bool) -> None:
    """Writes the files, and prints the result."""
    import sys

    from distill_jax.analysis.findings import print_findings, to_json_text, write_findings

    write_findings(findings, folder, name)
    if as_json:
        print(to_json_text(findings))
    else:
        print_findings(findings)
    print(f"written: {folder / name}.md and more beside it", file=sys.stderr)


@analyse.command()
def feedback(runs: RunFolders, to: To = None, as_json: AsJson = False) -> None:
    """Table 3: successes of the teacher with and without the student's mistake."""
    from distill_jax.analysis.feedback import study_feedback

    _put(study_feedback(runs), to or runs[0] / "analysis", "feedback", as_json)


@analyse.command()
def rounds(runs: RunFolders, to: To = None, as_json: AsJson = False) -> None:
    """Table 5: data, training error and accuracy, round by round."""
    from distill_jax.analysis.round_course import study_rounds

    _put(study_rounds(runs), to or runs[0] / "analysis", "rounds", as_json)


@analyse.command()
def setting(
    runs: RunFolders,
    key: Annotated[str, typer.Option(help="The setting that varies.")] = "reflection.weight",
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Figures 5 and 6: accuracy and loss by the value of one setting."""
    from distill_jax.analysis.setting import study_setting

    _put(study_setting(runs, key), to or runs[0] / "analysis", "setting", as_json)


@analyse.command()
def cases(
    runs: RunFolders,
    question: Annotated[str, typer.Option(help="The id of the only question to show.")] = "",
    fate: Annotated[
        str, typer.Option(help="mended, unmended, forgotten or always-right; all if left out.")
    ] = "",
    number: Annotated[int, typer.Option(min=1, help="Questions, evenly spaced.")] = 10,
    to: Annotated[Path | None, typer.Option(help="A Markdown file to write as well.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tables 2, 13 and 14: a question's mistakes and rationales through all rounds and runs."""
    import json

    from distill_jax.analysis.stories import choose_stories, stories_json, tell
    from distill_jax.run_folder import write_text

    stories = choose_stories(runs, question=question, fate=fate, number=number)
    if to:
        write_text(to, tell(stories))
    print(json.dumps({"cases": stories_json(stories)}) if as_json else tell(stories))


@analyse.command()
def reflection(
    runs: RunFolders,
    number: Number = 200,
    round_index: Round = -1,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Table 4: how far apart students hold right and wrong reasoning, and which is likelier."""
    keep_compiled()
    from distill_jax.analysis.reflection import study_reflection
    from distill_jax.progress import Progress

    found = study_reflection(runs, limit=number, round_index=round_index, progress=Progress())
    _put(found, to or runs[0] / "analysis", "reflection", as_json)


@analyse.command()
def states(
    runs: RunFolders,
    number: Number = 200,
    round_index: Round = -1,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Figure 4: a map of the states of right and wrong answers, with silhouette and probe."""
    import importlib.util

    if importlib.util.find_spec("sklearn") is None:
        raise ValueError("analyse states needs scikit-learn: pip install 'distill_jax[analysis]'.")
    keep_compiled()
    from distill_jax.analysis.state_map import study_states
    from distill_jax.progress import Progress

    found = study_states(runs, limit=number, round_index=round_index, progress=Progress())
    _put(found, to or runs[0] / "analysis", "states", as_json)


@analyse.command()
def judge(
    run: RunFolder,
    settings: Annotated[
        list[str],
        typer.Argument(metavar="TEACHER.KEY=VALUE...", help="Who judges, and the budget."),
    ],
    number: Annotated[int, typer.Option(min=1, help="Right ones per exam, and wrong ones.")] = 100,
    repeats: Annotated[int, typer.Option(min=1, help="Judgements of each.")] = 3,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Table 6: rationales scored from 1 to 5 by any endpoint. Asks it: this may cost money."""
    from distill_jax.analysis.judging import judge_run
    from distill_jax.progress import Progress

    home = to or run / "analysis"
    found = judge_run(run, settings, number=number, repeats=repeats, to=home, progress=Progress())
    _put(found, home, "judged", as_json)


@analyse.command()
def transfer(
    runs: RunFolders,
    task: Annotated[list[str], typer.Option(help="A task, or a question file; may be repeated.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY.SUB=VALUE for all exams.")
    ] = None,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Table 11: students of one task examined on others. The same command goes on."""
    keep_compiled()
    from distill_jax.analysis.transfer import study_transfer
    from distill_jax.progress import Progress

    found = study_transfer(runs, task, set_ or [], progress=Progress())
    _put(found, to or runs[0] / "analysis", "transfer", as_json)


@analyse.command()
def voting(
    runs: RunFolders,
    votes: Annotated[int, typer.Option(min=1, help="Samples per test question.")] = 8,
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Does it help to let most of several samples decide? Each run against itself and the first."""
    keep_compiled()
    from distill_jax.analysis.voting import study_voting
    from distill_jax.progress import Progress

    found = study_voting(runs, votes=votes, progress=Progress())
    _put(found, to or runs[0] / "analysis", "voting", as_json)


def compare(
    runs: RunFolders,
    split: Annotated[str, typer.Option(help="test, or dev, which flatters.")] = "test",
    to: To = None,
    as_json: AsJson = False,
) -> None:
    """Do runs differ? Seeds pooled, same questions, intervals and tests; the first is the base."""
    from distill_jax.analysis.comparison import compare_runs

    if split not in ("test", "dev"):
        raise ValueError(f"--split is test or dev; got {split!r}.")
    _put(compare_runs(runs, split=split), to or runs[0] / "analysis", "compare", as_json)


def sweep(
    words: Annotated[
        list[str], typer.Argument(metavar="CONFIG... [KEY.SUB=A,B,C]...", help="What to run.")
    ],
    to: Annotated[
        Path | None,
        typer.Option(
            parser=folder_here,
            help="Where the runs' folders lie; each config's own `folder` if left out.",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Run a small grid of settings and seeds; one report. The same command goes on."""
    from distill_jax.analysis.sweep import exit_code, plan_sweep, run_sweep

    configs = [Path(word) for word in words if "=" not in word]
    if not configs:
        raise ValueError("a sweep needs a config, such as configs/quickstart.yaml.")
    members = plan_sweep(configs, [word for word in words if "=" in word], to=to)
    from distill_jax.analysis.sweep_report import report_sweep
    from distill_jax.progress import Progress

    members = run_sweep(members, Progress())
    home = to or members[0].folder.parent
    _put(report_sweep(members), home, "sweep", as_json)
    raise SystemExit(exit_code(members))
