"""The model card of an exported student: where it comes from, what it scores, how to ask it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from distill_jax.config import Config
from distill_jax.progress import one_line, printable
from distill_jax.prompts import demonstrations, exam_prompt
from distill_jax.records import Form
from distill_jax.report.headline import NOT_KNOWN, headline, percent
from distill_jax.report.settings import beyond_paper, flatten
from distill_jax.report.summary import Summary, read_questions, summarise
from distill_jax.report.tables import held_out_table

_STEERING = re.compile(r"[\\`*_\[\]|~$]")


def make_card(folder: Path, round_index: int, *, name: str) -> str:
    """The model card of a round, as Markdown with the front matter that hubs read.

    Args:
      folder: The run.
      round_index: Whose weights are described; 0 is the untrained student.
      name: Of the exported model.

    Raises:
      ValueError: there is no run in `folder`, or a file in it can't be read.
    """
    summary = summarise(folder)
    config, manifest = summary.config, summary.manifest
    environment = Environment(
        loader=PackageLoader("distill_jax", "."),
        autoescape=False,  # this is not HTML; `plain` guards every value
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(plain=plain, fenced=fenced)
    return environment.get_template("model_card.md.jinja").render(
        name=name,
        round_index=round_index,
        front_matter=_front_matter(config),
        facts=_facts(config, manifest),
        headline=headline(summary),
        held_out=held_out_table(summary),
        settings=[row for row in beyond_paper(config) if row[0] not in _LISTED],
        rounds=_rounds(summary),
        demonstrations="student" in config.task.demonstrations
        and demonstrations(config.task.name, config.train.targets[0]) != "",
        prompt_version=str(manifest.get("prompt_version", NOT_KNOWN)),
        prompt=_prompt(folder, config.train.targets[0]),
        versions=list(flatten(manifest.get("versions", {}))),
    )


def plain(text: str) -> str:
    """Text as one line of Markdown that means nothing but itself.

    Example:
      >>> plain("[a](b)\\n<i>| `x`")
      '\\\\[a\\\\](b) &lt;i&gt;\\\\| \\\\`x\\\\`'
    """
    line = one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _STEERING.sub(r"\\\g<0>", line)


def fenced(text: str) -> str:
    """Text of several lines as a block of code that nothing in it can end.

    Example:
      >>> print(fenced("Question: 3 + 4?"))
      ```text
      Question: 3 + 4?
      ```
    """
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{printable(text)}\n{fence}"


_LISTED = ("task.name", "student.model", "teacher.model", "teacher.url", "folder")
"""Settings that the card names elsewhere, or that concern nobody but the run's owner."""


def _front_matter(config: Config) -> str:
    """What hubs index. Only a hub id is named as the base model: a path means nothing there."""
    facts: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["distill_jax", "reasoning"],
    }
    if re.fullmatch(r"[\w.-]+/[\w.-]+", config.student.model) and not _is_here(config):
        facts["base_model"] = config.student.model
    return yaml.safe_dump(facts, sort_keys=False)


def _is_here(config: Config) -> bool:
    return Path(config.student.model).is_dir()


def _facts(config: Config, manifest: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Who and what; of a directory or a file of the user's, the last name only."""
    student, task = config.student.model, config.task.name
    return [
        ("student", Path(student).name if _is_here(config) else student),
        ("task", Path(task).name),
        ("teacher", config.teacher.model),
        ("prompt version", str(manifest.get("prompt_version", NOT_KNOWN))),
        ("seed", str(config.seed)),
    ]


def _rounds(summary: Summary) -> list[tuple[str, ...]]:
    return [
        (
            str(entry.round_index),
            NOT_KNOWN if entry.rows is None else f"{entry.rows:,}",
            NOT_KNOWN if entry.steps is None else f"{entry.steps:,}",
            percent(entry.dev_accuracy),
        )
        for entry in summary.rounds
        if entry.round_index
    ]


def _prompt(folder: Path, form: Form) -> str:
    """A training question as the student was asked it, without worked examples."""
    questions = read_questions(folder).values()
    question = next(question for question in questions if question.split == "train")
    return exam_prompt(question, demonstrations="", form=form)
