"""The key of a teacher: where it comes from, and that nobody ever sees it."""

import os
import re
import shlex
import subprocess
from pathlib import Path

from distill_jax.teacher.reply import CredentialsRefused

_SHORTEST = 8  # a shorter key, such as `EMPTY`, is an ordinary word and hides nothing
_COMMAND_S = 60.0
_LOOKS_LIKE_A_KEY = re.compile(
    r"\bsk-[\w-]{8,}|(?<=[Bb]earer )[\w.~+/=-]{8,}"
    r"|(?<=[?&]key=)[^&\s\"',]+|(?<=api_key=)[^&\s\"',]+"
)


class Secret:
    """A key, read from the first of three places that has one.

    These are the environment variable `name` itself, the file that `name` + `_FILE` names, which
    nobody else may read, and the command that `name` + `_COMMAND` holds. The file and the command
    are asked again when a key is refused in the middle of a run, so that a new one can be put in
    place.

    Args:
      name: The environment variable.

    Raises:
      CredentialsRefused: the file is readable for others, or file or command give nothing.
    """

    def __init__(self, name: str):
        self.name = name
        self.value = self._read()
        self._seen = {self.value}

    def read_again(self) -> bool:
        """Reads the key anew; says whether it is another one.

        Raises:
          CredentialsRefused: as when it was first read.
        """
        before, self.value = self.value, self._read()
        self._seen.add(self.value)
        return self.value != before

    def _read(self) -> str:
        if self.name in os.environ:
            return os.environ[self.name].strip()
        path, command = (os.environ.get(f"{self.name}_{how}", "") for how in ("FILE", "COMMAND"))
        if path:
            return self._read_file(Path(path))
        return self._ask(command) if command else ""

    def _read_file(self, path: Path) -> str:
        try:
            if path.stat().st_mode & 0o077:
                raise CredentialsRefused(
                    f"the key in {path} can be read by others; run: chmod 600 {path}."
                )
            return self._not_empty(path.read_text(), f"the file {path}")
        except OSError as error:
            raise CredentialsRefused(f"{self.name}_FILE: {path}: {error.strerror}.") from None

    def _ask(self, command: str) -> str:
        words = shlex.split(command)
        try:
            said = subprocess.run(
                words, stdout=subprocess.PIPE, text=True, timeout=_COMMAND_S, check=True
            ).stdout
        except (OSError, subprocess.SubprocessError):
            said = ""
        return self._not_empty(said, f"the command in {self.name}_COMMAND")

    def _not_empty(self, key: str, where: str) -> str:
        if not key.strip():
            raise CredentialsRefused(f"{where}, which should give a key, gives none.")
        return key.strip()

    def hide(self, text: str) -> str:
        """Text without the keys read so far."""
        for key in self._seen:
            if len(key) >= _SHORTEST:
                text = text.replace(key, "[key]")
        return text

    def hide_all(self, text: str) -> str:
        """The same, and without whatever else looks like a key; for text that is no answer.

        Example:
          >>> Secret("NOT_SET").hide_all("GET /v1?key=abc, Bearer 0123456789ab, sk-or-1234567")
          'GET /v1?key=[key], Bearer [key], [key]'
        """
        return _LOOKS_LIKE_A_KEY.sub("[key]", self.hide(text))
