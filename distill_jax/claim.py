"""Who works on a run in a bucket: an object there that is signed again and again."""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

from distill_jax.bucket import Bucket, BucketError
from distill_jax.config import ConfigError

OBJECT = "lock.json"
"""In the run's place: who works on it, or was the last to."""

SILENT_S = 300.0
"""Without a new sign, after which whoever worked on a run counts as lost."""

_SIGN_S = 10.0  # between two signs, at least
_POLL_S = 5.0
_SETTLE_S = 1.0  # for two that take a run at the same time to see each other


class RunTaken(BucketError):
    """Another machine works on the run now."""


class Claim:
    """This machine's claim on a run.

    Args:
      bucket: The run's place.
      name: Under which this machine made a claim before, or "".

    Attributes:
      name: The name of the newest claim made from here.
      held: Whether this process works on the run.
    """

    def __init__(self, bucket: Bucket, name: str):
        self.name, self.held = name, False
        self._bucket, self._signed = bucket, 0.0

    @property
    def is_last(self) -> bool:
        """Whether nobody has worked on the run since this machine did."""
        return bool(self.name) and self._read().get("name") == self.name

    @property
    def silent_s(self) -> float:
        """Seconds since the last sign."""
        return time.monotonic() - self._signed

    def await_others(self, note: Callable[[str], None]) -> None:
        """Returns once nobody else works on the run.

        Args:
          note: Is told if that takes a while.

        Raises:
          ConfigError: somebody else does, and lives.
        """
        first = self._read()
        if not first.get("held") or first["name"] == self.name:
            return
        left = SILENT_S - (time.time() - first["time"])
        if left > 0:
            note(
                f"{first['holder']} was working on {self._bucket.url}; waiting {left:.0f} s for "
                "another sign of it"
            )
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(_POLL_S)
            now = self._read()
            if not now.get("held"):
                return
            if now["time"] != first["time"]:
                raise ConfigError(f"{self._bucket.url} is being worked on by {now['holder']}.")

    def make(self) -> None:
        """Makes a new claim.

        Raises:
          ConfigError: another machine made one at the same time.
        """
        self.name = uuid.uuid4().hex
        self.sign(held=True)
        time.sleep(_SETTLE_S)
        now = self._read()
        if now.get("name") != self.name:
            raise ConfigError(f"{self._bucket.url} was just taken by {now.get('holder')}.")

    def sign(self, *, held: bool) -> None:
        """Says that this process works on the run, or no longer does."""
        sign = {
            "name": self.name,
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "held": held,
            "time": time.time(),
        }
        self._bucket.write(OBJECT, json.dumps(sign).encode())
        self.held, self._signed = held, time.monotonic()

    def renew(self) -> None:
        """Signs again if that is due; does nothing unless this process works on the run.

        Raises:
          RunTaken: there was no sign for so long that another machine has taken the run.
        """
        if not self.held or self.silent_s < _SIGN_S:
            return
        now = self._read()
        if now.get("name") != self.name:
            raise RunTaken(
                f"{self._bucket.url} was taken by {now.get('holder', 'nobody')}, which had seen no "
                "sign of this process for too long. The same command goes on from there."
            )
        self.sign(held=True)

    def _read(self) -> dict[str, Any]:
        return json.loads(self._bucket.read(OBJECT) or b"{}")
