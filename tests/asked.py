"""One call of a client against a fault server: what it gave, and what the server saw."""

import os
from collections.abc import Iterable
from pathlib import Path

from fault_server import Behaviour, fault_server
from paid_lesson import QUICK

from distill_jax.config import TeacherConfig
from distill_jax.teacher.account import Ask
from distill_jax.teacher.audit import read_totals
from distill_jax.teacher.client import TeacherClient
from distill_jax.teacher.ledger import Ledger
from distill_jax.teacher.reply import TeacherError

KEY = "sk-canary-3f9a1c77d2"
CENT_PER_THOUSAND = (10.0, 10.0)  # dollars per million tokens


os.environ["TEACHER_KEY"] = KEY


def config(**changes) -> TeacherConfig:
    knobs = {"url": "http://x/v1", "model": "m", "samples": 2, "api_key_env": "TEACHER_KEY"}
    return TeacherConfig.model_validate(knobs | changes)


def asks(prompts: Iterable[str], samples: int = 2) -> list[Ask]:
    return [Ask(prompt, tuple(range(samples))) for prompt in prompts]


class Outcome:
    """What one call of `complete` gave, and what the server saw of it."""

    def __init__(self, folder: Path, behave: Behaviour, prompts, *, patience=QUICK, **changes):
        self.path = folder / "ledger.sqlite"
        self.answers = []
        self.raised: TeacherError | None = None
        with fault_server(behave) as (self.server, self.url), Ledger(self.path) as ledger:
            client = TeacherClient(
                config(**changes), ledger, url=self.url, free=True, patience=patience
            )
            try:
                self.answers = client.complete(asks(prompts, changes.get("samples", 2)))
            except TeacherError as raised:
                self.raised = raised
            self.totals = read_totals(self.path)

    @property
    def texts(self) -> list[list[str]]:
        return [[completion.text for completion in row] for row in self.answers]

    def again(self, behave: Behaviour, prompts, **changes) -> "Outcome":
        """The same call on the same ledger; the server keeps its endpoint's name only as tutor."""
        return Outcome(self.path.parent, behave, prompts, **changes)
