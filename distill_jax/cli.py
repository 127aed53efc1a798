"""The commands. Everything heavy is imported inside them, so that `--help` answers at once.

Messages go to stderr, results to stdout. Exit codes: 0 done, 1 a bug, 2 wrong usage or config,
10 paused by the budget, 11 quota exhausted, 12 credentials refused, 13 disk, 14 interrupted.
"""

import json
import os
import sys
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import typer.core

from distill_jax.analysis_commands import analyse, compare, sweep
from distill_jax.endings import exit_code, sentence
from distill_jax.ledger_commands import ledger
from distill_jax.machine import keep_compiled
from distill_jax.run_arguments import RunFolder, RunFolders, folder_here


class Commands(typer.core.TyperGroup):
    """Runs a command, and turns what users can mend into one sentence and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        try:
            return super().invoke(ctx)
        except typer.Exit:  # also a RuntimeError; help has been shown
            raise
        except (KeyboardInterrupt, ValueError, OSError, RuntimeError) as error:
            code = exit_code(error)
            if code is None:
                raise
            _leave(sentence(error), code)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Teaches a small language model to reason, round by round, with a large one as its tutor.",
)
data = typer.Typer(no_args_is_help=True, help="Question sets on this machine.")
app.add_typer(data, name="data")
app.add_typer(ledger, name="ledger")
app.add_typer(analyse, name="analyse")


class SplitName(StrEnum):
    """The splits of a question set."""

    TRAIN = "train"
    DEV = "dev"
    TEST = "test"


class DtypeName(StrEnum):
    """What written weights may be."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Sink(StrEnum):
    """Trackers of the figures of training."""

    TENSORBOARD = "tensorboard"
    WANDB = "wandb"


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="Settings that win.")
]
WrittenDtype = Annotated[
    DtypeName, typer.Option("--dtype", help="Of the weights; bfloat16 halves the files.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _leave(message: str, code: int) -> NoReturn:
    print(f"distill-jax: {message}", file=sys.stderr)
    raise SystemExit(code)


def _show(value: dict[str, Any], as_json: bool, show: Callable[[], None] | None = None) -> None:
    """Prints a result, as one JSON object or for a reader."""
    if as_json:
        print(json.dumps(value, ensure_ascii=False))
    elif show is not None:
        show()
    else:
        for key, item in value.items():
            print(f"{key.replace('_', ' ')}: {item}")


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A config, such as configs/quickstart.yaml.")],
    overrides: Overrides = None,
    coordinator: Annotated[
        str | None,
        typer.Option(envvar="JAX_COORDINATOR_ADDRESS", help="HOST:PORT of process 0, of several."),
    ] = None,
    processes: Annotated[
        int | None, typer.Option(envvar="JAX_NUM_PROCESSES", help="How many there are.")
    ] = None,
    process: Annotated[
        int | None, typer.Option(envvar="JAX_PROCESS_ID", help="Which one this is, from 0.")
    ] = None,
    in_cluster: Annotated[
        bool, typer.Option("--in-cluster", help="Ask the cluster all that, as JAX can.")
    ] = False,
    lost_after: Annotated[
        float, typer.Option(min=1, help="Seconds without a sign of life of another process.")
    ] = 60.0,
    stuck_after: Annotated[
        float, typer.Option(min=1, help="Seconds without progress of another process.")
    ] = 1800.0,
    sinks: Annotated[
        list[Sink] | None,
        typer.Option("--sink", help="Where figures of training go, too."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Teach a student round by round. The same command continues an interrupted run.

    On several hosts each runs this same command: Slurm and TPU pods say who is who, elsewhere the
    options do.
    """
    from distill_jax.config_file import load_config
    from distill_jax.interrupts import heed_preemption
    from distill_jax.membership import find_member
    from distill_jax.mirror import opened
    from distill_jax.processes import Limits, is_main
    from distill_jax.shelter import take_shelter
    from distill_jax.sinks import SinkName, check_sinks

    settings = load_config(config, overrides or [])
    named: list[SinkName] = [sink.value for sink in sinks or []]
    check_sinks(named)
    member = find_member(coordinator, processes, process, in_cluster=in_cluster)
    if member:
        take_shelter(member.index)
    keep_compiled()
    from distill_jax.cluster import join

    with join(member, Limits(start=5 * lost_after, lost=lost_after, stuck=stuck_after)):
        heed_preemption()  # here, since JAX looks after the signal too
        from distill_jax import rounds

        rounds.run(settings, sinks=named)
        if is_main():
            with opened(folder_here(settings.folder)) as folder:
                _show_run(folder, as_json)


def _show_run(folder: Path, as_json: bool) -> None:
    from distill_jax.report.page import write_page
    from distill_jax.report.summary import status_json, summarise
    from distill_jax.report.tables import print_runs

    page = write_page([folder], folder / "report.html")
    summary = summarise(folder)
    _show(status_json(summary), as_json, lambda: print_runs([summary]))
    print(f"report: {page}", file=sys.stderr)


@app.command()
def exam(
    ctx: typer.Context,
    student: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="Who sits the exam.")],
    overrides: Overrides = None,
    task: Annotated[str, typer.Option(help="Questions; a run's own if left out.")] = "",
    split: Annotated[SplitName, typer.Option(help="Which of them.")] = SplitName.TEST,
    round_index: Annotated[int, typer.Option("--round", help="-1: the run's chosen round.")] = -1,
    votes: Annotated[
        int, typer.Option(min=0, help="Samples per question, for majority vote and pass@k.")
    ] = 0,
    as_json: AsJson = False,
) -> None:
    """Sit one exam: accuracy with its interval, unreadable and cut answers."""
    from distill_jax.config_file import load_config, make_config, override
    from distill_jax.mirror import opened
    from distill_jax.run_folder import read_json

    folder = ctx.with_resource(opened(folder_here(student)))
    chosen = round_index
    changes = [*([f"task.name={task}"] if task else []), *(overrides or [])]
    if (folder / "config.yaml").exists():
        settings = override(load_config(folder / "config.yaml"), changes)
        chosen = read_json(folder / "result.json").get("chosen_round", 0) if chosen < 0 else chosen
    else:
        chosen = max(chosen, 0)
        model = {"folder": student, "task": {"name": task}, "student": {"model": student}}
        settings = make_config(model, changes)
    keep_compiled()
    from distill_jax.progress import Progress
    from distill_jax.resit import examine

    result = examine(
        settings,
        folder,
        split=split.value,
        round_index=chosen,
        progress=Progress(),
        votes=votes,
    )
    _show({"task": settings.task.name, "split": split.value, "round": chosen, **result}, as_json)


@app.command()
def status(run: RunFolder, as_json: AsJson = False) -> None:
    """Where a run stands, what it has spent, what is left, and what went wrong."""
    from distill_jax.report.summary import status_json, summarise
    from distill_jax.report.tables import print_status

    summary = summarise(run)
    _show(status_json(summary), as_json, lambda: print_status(summary))


@app.command()
def report(
    runs: RunFolders,
    to: Annotated[Path | None, typer.Option(help="The page; RUN/report.html if left out.")] = None,
    as_json: AsJson = False,
) -> None:
    """Tables here and one HTML page, for one run or several side by side."""
    from distill_jax.report.page import write_page
    from distill_jax.report.summary import status_json, summarise
    from distill_jax.report.tables import print_runs

    page = write_page(runs, to or runs[0] / "report.html")
    summaries = [summarise(run) for run in runs]
    facts = {"page": str(page), "runs": [status_json(summary) for summary in summaries]}
    _show(facts, as_json, lambda: print_runs(summaries))
    print(f"report: {page}", file=sys.stderr)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="A config, such as configs/quickstart.yaml.")],
    overrides: Overrides = None,
    hardware: Annotated[
        list[str] | None, typer.Option(help="Counts for a chip, and how many, such as h100:8.")
    ] = None,
    topologies: Annotated[
        list[str] | None,
        typer.Option("--topology", help="Compiles for a TPU slice, such as v5e:4x4; needs libtpu."),
    ] = None,
    answers: Annotated[bool, typer.Option(help="Compile the program of exams too.")] = True,
    as_json: AsJson = False,
) -> None:
    """Before anything is spent: requests, dollars, tokens, memory and time; does it fit?

    Reads the student's config.json and tokenizer, never its weights.
    """
    from distill_jax.config_file import load_config

    settings = load_config(config, overrides or [])
    # Whatever the programs are compiled for, nothing here touches a device.
    os.environ["JAX_PLATFORMS"] = "cpu"
    from distill_jax.plan.fit import compile_programs, fit, plan_student
    from distill_jax.plan.page import page_json, page_lines
    from distill_jax.plan.teacher import plan_teacher
    from distill_jax.weights import WeightsError

    teacher, student = plan_teacher(settings), None
    fits, compiled = [], []
    try:
        student = plan_student(settings)
        fits = [fit(settings, student, name) for name in hardware or []]
        compiled = [
            compile_programs(settings, student, name, answers=answers) for name in topologies or []
        ]
    except WeightsError as error:
        if hardware or topologies:
            raise
        print(f"nothing is known of the student: {error}", file=sys.stderr)
    everything = (teacher, student, fits, compiled)
    _show(
        page_json(*everything), as_json, lambda: print("\n".join(page_lines(settings, *everything)))
    )


@app.command()
def tutor(
    task: Annotated[str, typer.Option(help="The questions it can explain.")],
    overrides: Overrides = None,
    port: Annotated[int, typer.Option(help="On the loopback address; 0 takes a free one.")] = 8000,
) -> None:
    """Serve the built-in teacher as an OpenAI-compatible endpoint on this machine."""
    from distill_jax.config_file import make_config
    from distill_jax.questions import default_data_dir, load_questions
    from distill_jax.teacher.tutor import serve_forever

    number = 1000 if task == "arithmetic" else 0  # as many as are made, or all there are
    values = {"folder": "-", "task": {"name": task, "num_train": number}, "student": {"model": "-"}}
    settings = make_config(values, overrides or [])
    questions = load_questions(settings.task, seed=settings.seed, data_dir=default_data_dir())
    serve_forever(questions, tutor=settings.tutor, seed=settings.seed, port=port)


@data.command()
def prepare(
    task: Annotated[str, typer.Argument(help="gsm8k, multiarith, svamp, csqa or strategyqa.")],
    source: Annotated[
        Path | None, typer.Option("--from", help="A folder with the raw files; else downloads.")
    ] = None,
    split: Annotated[str, typer.Option(help="ho2023, or chilled.")] = "ho2023",
    as_json: AsJson = False,
) -> None:
    """Download a question set, or build it from raw files in a folder."""
    from distill_jax.questions import default_data_dir, prepare

    counts = prepare(task, split=split, data_dir=default_data_dir(), source=source)
    _show({"task": task, "split": split, **counts}, as_json)


@app.command(name="import")
def import_(
    model: Annotated[str, typer.Argument(help="A Hugging Face directory or hub id.")],
    to: Annotated[Path, typer.Option(help="The directory to make.")],
    pickled: Annotated[
        bool, typer.Option("--pickled", help="Read pytorch_model.bin; needs torch.")
    ] = False,
    dtype: WrittenDtype = DtypeName.FLOAT32,
    as_json: AsJson = False,
) -> None:
    """Check every weight of a published model, and keep it as a student directory."""
    keep_compiled()
    from distill_jax.exchange import import_model

    _show(import_model(model, to, pickled=pickled, dtype=dtype.value), as_json)


@app.command()
def export(
    run: RunFolder,
    to: Annotated[Path, typer.Option(help="The directory to make.")],
    round_index: Annotated[int, typer.Option("--round", help="-1: the chosen round.")] = -1,
    dtype: WrittenDtype = DtypeName.FLOAT32,
    adapters: Annotated[
        bool, typer.Option("--adapters", help="The adapters alone, in peft's layout.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a round's student as a Hugging Face directory, ready for transformers and servers."""
    keep_compiled()
    from distill_jax.exchange import export_round

    settings = {"round_index": round_index, "dtype": dtype.value, "adapters": adapters}
    _show(export_round(run, to, **settings), as_json)


app.command()(compare)
app.command()(sweep)
