"""When a request may be tried again, and for how long: decisions without effects.

The client observes faults, sleeps and sends; this file only says whether and when.
"""

from dataclasses import dataclass
from random import Random

from distill_jax.teacher.reply import Fault


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one prompt is tried before its missing answers count as failed.

    Attributes:
      attempts: Requests that may end in a fault. A rate limit that names a wait is not counted:
        only the deadline bounds it.
      bad_answers: Of these, how many may end in an answer that can't be used.
      request_s: Seconds for one request, from sending to the last byte.
      total_s: Seconds after which a prompt is not asked again.
      backoff_s: The longest first wait; it doubles with each fault.
      longest_backoff_s: Where it stops doubling.
      failed_prompts: Prompts in a row that may fail before the teacher counts as unavailable.
    """

    attempts: int = 6
    bad_answers: int = 3
    request_s: float = 300.0
    total_s: float = 1800.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    failed_prompts: int = 8


PATIENCE = Patience()


@dataclass
class Tries:
    """The faults of one prompt so far."""

    faults: int = 0
    bad_answers: int = 0

    def next_wait(self, fault: Fault, patience: Patience, random: Random) -> float | None:
        """Counts a fault and says how many seconds to wait before the next request.

        Waits grow exponentially and are drawn at random below their limit, so that requests which
        failed together don't come back together. A wait that the server names is a lower bound.

        Returns:
          Seconds, or None when there is no next request: this fault was one too many, or it will
          not go away.

        Example:
          >>> tries, busy = Tries(), Fault("server error", "503", billed=False)
          >>> waits = [tries.next_wait(busy, Patience(attempts=3), Random(0)) for _ in range(3)]
          >>> waits[0] <= 1.0, waits[1] <= 2.0, waits[2]
          (True, True, None)
        """
        if fault.kind == "rate limit" and fault.retry_after_s is not None:
            return fault.retry_after_s + random.uniform(0.0, patience.backoff_s)
        self.faults += 1
        self.bad_answers += fault.kind == "bad answer"
        if (
            fault.kind == "refused prompt"
            or self.faults >= patience.attempts
            or self.bad_answers >= patience.bad_answers
        ):
            return None
        longest = min(patience.longest_backoff_s, patience.backoff_s * 2 ** (self.faults - 1))
        return (fault.retry_after_s or 0.0) + random.uniform(0.0, longest)
