"""A small grid of settings and seeds over one config or several: every member is a run of its own.

Members run one after the other, each in a process: what one leaves in memory, or dies of, is none
of the next one's business. The same call goes on where it stopped, as every member does.
"""

import itertools
import json
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill_jax.bucket import bucket_url, local_folder
from distill_jax.config import Config, ConfigError
from distill_jax.config_file import load_config
from distill_jax.endings import INTERRUPTED
from distill_jax.progress import Progress
from distill_jax.run_folder import open_run

STOPS_ALL = (11, 12, 13, 14)
"""Exit codes that the next member would end with, too: quota, credentials, disk, interrupt."""


@dataclass(frozen=True, slots=True)
class Member:
    """One run of a sweep.

    Attributes:
      config: Its settings; `config.folder` is its own.
      exit_code: What it ended with; None before it has been run.
    """

    config: Config
    exit_code: int | None = None

    @property
    def folder(self) -> Path:
        return local_folder(self.config.folder)

    @property
    def finished(self) -> bool:
        return (self.folder / "result.json").exists()


def plan_sweep(
    configs: Sequence[Path], settings: Sequence[str], *, to: Path | None = None
) -> list[Member]:
    """All members, in order: configs, then every combination of values. Writes nothing.

    Args:
      configs: Config files.
      settings: `key.sub=a,b,c`; a single value is set in all members. Lists stand in brackets.
      to: Where the members' folders lie, each config's in a folder of the file's name; each
        config's own `folder` if left out. A member is named after what varies, as `seed=1`.

    Raises:
      ConfigError: a config can't be read, a setting is not allowed, or two members have one folder.
    """
    axes = [_parse_axis(setting) for setting in settings]
    members = []
    for path in configs:
        home = to / path.stem if to else local_folder(load_config(path).folder)
        for values in itertools.product(*(choices for _, choices in axes)):
            chosen = [(key, value) for (key, _), value in zip(axes, values, strict=True)]
            name = ",".join(
                _name(key, value)
                for (key, value), (_, choices) in zip(chosen, axes, strict=True)
                if len(choices) > 1
            )
            overrides = [f"{key}={json.dumps(value)}" for key, value in chosen]
            folder = bucket_url(home / name) or str(home / name)
            overrides.append(f"folder={json.dumps(folder)}")
            members.append(Member(load_config(path, overrides)))
    folders = [member.folder for member in members]
    for folder in folders:
        if folders.count(folder) > 1:
            raise ConfigError(f"two members of the sweep have the folder {folder}; use --to.")
    return members


def _parse_axis(setting: str) -> tuple[str, list[Any]]:
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise ConfigError(f"a setting is written key.sub=a,b,c; got {setting!r}.")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        raise ConfigError(f"the values of {setting!r} are not YAML.") from None
    if key == "folder" or not values:
        raise ConfigError(
            f"{setting!r}: a sweep needs values, and names its own folders; see --to."
        )
    return key, values


def _name(key: str, value: Any) -> str:
    """A member's part of a file name."""
    return re.sub(r"[^\w.+=-]+", "-", f"{key}={value}").strip("-")


def run_sweep(members: Sequence[Member], progress: Progress) -> list[Member]:
    """Runs every member that has not ended; one that fails does not keep the others.

    Returns:
      The members with their exit codes, 0 for those that had ended before. After a code that the
      next one would end with, too, the rest are left as they are.

    Raises:
      ConfigError: the folder of a member holds a run with other settings. Nothing has been run.
    """
    for member in members:
        open_run(member.config)
    ran = []
    with progress.stage("sweep", total=len(members), unit="runs") as advance:
        for member in members:
            code = 0 if member.finished else _run(member)
            ran.append(Member(member.config, code))
            advance(1, f"{member.folder}: {'done' if not code else f'exit code {code}'}")
            if code in STOPS_ALL:
                break
    return [*ran, *members[len(ran) :]]


def _run(member: Member) -> int:
    """The exit code of a member's run in a process of its own, which hears our interrupts once.

    An interrupted one counts as that however it ended: it may have been struck as it began.
    """
    command = [sys.executable, "-m", "distill_jax", "run", str(member.folder / "config.yaml")]
    process = subprocess.Popen(
        [*command, "--json"], stdout=subprocess.DEVNULL, start_new_session=True
    )
    interrupted = False
    while True:
        try:
            code = process.wait()
            return INTERRUPTED if interrupted else code
        except KeyboardInterrupt:
            interrupted = True
            process.send_signal(signal.SIGINT)


def exit_code(members: Sequence[Member]) -> int:
    """0 if all ended; else that of the first that did not, and 1 for one that was killed."""
    codes = [member.exit_code for member in members if member.exit_code]
    return 0 if not codes else 1 if codes[0] < 0 else codes[0]
