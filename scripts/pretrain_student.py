"""Trains a small student from nothing on generated arithmetic text, for several runs to share.

    python scripts/pretrain_student.py CONFIG DIRECTORY [key.sub=value ...]
    distill-jax run CONFIG student.model=DIRECTORY

Size and steps are those of the config's `scratch`; the text has the numbers of its
`task.arithmetic` and never one of its questions' texts. Where its task is another than arithmetic,
such as svamp, the training questions are retold among the stories, without their answers, and the
tokenizer knows their words: a word that only the exams hold is unknown to the student.
"""

import argparse
import time
from pathlib import Path

from distill_jax.config_file import load_config
from distill_jax.contamination import ExamTexts
from distill_jax.layouts import open_mesh
from distill_jax.progress import Progress
from distill_jax.questions import default_data_dir, load_questions
from distill_jax.scratch import describe, make_student


def main() -> None:
    """Makes the directory, unless it is there."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path)
    parser.add_argument("directory", type=Path)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    if arguments.directory.exists():
        parser.error(f"{arguments.directory} is there already.")
    config = load_config(arguments.config, arguments.overrides)
    questions = load_questions(config.task, seed=config.seed, data_dir=default_data_dir())
    held_out = [question for question in questions if question.split != "train"]
    train = [question for question in questions if question.split == "train"]
    clean, _ = ExamTexts(held_out).split(train)
    everything = [*clean, *held_out]
    mesh, _ = open_mesh(config, describe(config, everything)[0])
    start = time.monotonic()
    make_student(
        config,
        arguments.directory,
        questions=everything,
        mesh=mesh,
        progress=Progress(),
    )
    print(f"{arguments.directory}: {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
