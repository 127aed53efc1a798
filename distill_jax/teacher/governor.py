"""How fast a teacher may be asked, and how often again: decisions without effects.

The client observes, sleeps and sends; this file only says when and whether. Every moment is handed
in, in seconds of a clock that never goes back, so that a test can play an hour in a millisecond and
a change of the wall clock changes nothing.
"""

import math
from collections import deque
from dataclasses import dataclass, field
from random import Random

from distill_jax.teacher.reply import Fault

_MINUTE = 60.0
_ENOUGH = 5  # outcomes, before the circuit judges a server
_TROUBLE = ("server error", "connection", "timeout", "bad answer")  # says something of the server


@dataclass(frozen=True, slots=True)
class Patience:
    """How long one prompt is tried, and a server that fails.

    Attributes:
      attempts: Requests for one prompt that may end in a fault. Rate limits are not counted: only
        the deadline bounds them.
      bad_answers: Of these, how many may end in an answer that can't be used.
      connect_s: Seconds for a connection to stand.
      read_s: Seconds without a byte.
      request_s: Seconds for one request, from sending to the last byte.
      total_s: Seconds after its first fault, after which a prompt is not asked again.
      backoff_s: The longest first wait; it doubles with each fault.
      longest_backoff_s: Where it stops doubling.
      longest_retry_after_s: The longest wait that is granted to a server that names one.
      cool_down_s: The first pause of the circuit; it doubles with each probe that fails.
      outage_s: Seconds without any answer after which a server that fails counts as unavailable.
      poll_s: Seconds between two looks at a batch; they double up to `longest_backoff_s`.
    """

    attempts: int = 6
    bad_answers: int = 3
    connect_s: float = 10.0
    read_s: float = 240.0
    request_s: float = 300.0
    total_s: float = 1800.0
    backoff_s: float = 1.0
    longest_backoff_s: float = 60.0
    longest_retry_after_s: float = 900.0
    cool_down_s: float = 5.0
    outage_s: float = 900.0
    poll_s: float = 5.0


PATIENCE = Patience()


@dataclass
class Tries:
    """The faults of one prompt so far."""

    faults: int = 0
    bad_answers: int = 0
    rate_limits: int = 0

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
        if fault.kind == "rate limit":
            self.rate_limits += 1
            doublings = 0 if fault.retry_after_s is not None else self.rate_limits - 1
        else:
            self.faults += 1
            self.bad_answers += fault.kind == "bad answer"
            doublings = self.faults - 1
            if (
                fault.kind == "refused prompt"
                or self.faults >= patience.attempts
                or self.bad_answers >= patience.bad_answers
            ):
                return None
        longest = min(patience.longest_backoff_s, patience.backoff_s * 2.0 ** min(doublings, 30))
        return (fault.retry_after_s or 0.0) + random.uniform(0.0, longest)


@dataclass
class Limit:
    """How many requests may be in flight: a little more with each answer, half after a refusal.

    Refusals that come in one burst were all sent under the old limit, so they halve it once: only
    a request sent after the last cut can cut again.

    Attributes:
      ceiling: The most that is ever allowed; also where it starts.

    Example:
      >>> limit = Limit(ceiling=32)
      >>> [limit.cut(sent=sent, now=2.0) for sent in (1.0, 1.1, 1.2)]
      [True, False, False]
      >>> limit.now
      16
    """

    ceiling: int
    _size: float = field(init=False)
    _cut_at: float = -math.inf

    def __post_init__(self) -> None:
        self._size = float(self.ceiling)

    @property
    def now(self) -> int:
        """Requests that may be in flight; at least one."""
        return max(1, int(self._size))

    def rise(self) -> None:
        """After an answer: one request more for every full set of them."""
        self._size = min(float(self.ceiling), self._size + 1.0 / self._size)

    def cut(self, *, sent: float, now: float) -> bool:
        """Halves the limit, unless the refused request was sent before the last cut."""
        if sent < self._cut_at:
            return False
        self._size, self._cut_at = max(1.0, self._size / 2.0), now
        return True


@dataclass
class Bucket:
    """An allowance per minute that refills evenly; a second of it may be used at once.

    In any 60 seconds at most `per_minute` is taken, so that a server which counts differently
    finds nothing to refuse. 0 allows everything.

    Example:
      >>> bucket = Bucket(per_minute=60)
      >>> bucket.wait(1, now=5.0), bucket.take(1, now=5.0), bucket.wait(1, now=5.25)
      (0.0, None, 0.75)
    """

    per_minute: int
    _level: float = field(init=False)
    _filled_at: float | None = None

    def __post_init__(self) -> None:
        self._capacity = max(1.0, self.per_minute / _MINUTE)
        self._rate = (self.per_minute + 1.0 - self._capacity) / _MINUTE
        self._level = self._capacity

    def wait(self, amount: int, *, now: float) -> float:
        """Seconds until `amount` may be taken; more than fits at once is taken as a debt."""
        if not self.per_minute:
            return 0.0
        if self._filled_at is not None:
            refill = (now - self._filled_at) * self._rate
            self._level = min(self._capacity, self._level + refill)
        self._filled_at = now
        lacking = min(amount, self._capacity) - self._level
        return max(0.0, lacking / self._rate)

    def take(self, amount: int, *, now: float) -> None:
        """Takes what `wait` has just allowed; a negative amount gives back what was not used."""
        self.wait(0, now=now)
        self._level = min(self._capacity, self._level - amount)


@dataclass
class Circuit:
    """Stops asking a server of which more than half the requests fail, but for one probe at a time.

    Attributes:
      patience: Its `cool_down_s` and `outage_s` are read.
    """

    patience: Patience
    _recent: deque[bool] = field(default_factory=lambda: deque(maxlen=20))
    _pauses: int = 0  # in a row
    _paused_at: float = -math.inf
    _until: float = -math.inf
    _silent_since: float | None = None  # the first failure after the last answer
    _probing: bool = False

    @property
    def closed(self) -> bool:
        """Whether everyone may ask."""
        return not self._pauses

    def wait(self, *, now: float) -> float:
        """Seconds until a request may go out; `inf` while a probe is on its way."""
        if not self._pauses:
            return 0.0
        return math.inf if self._probing else max(0.0, self._until - now)

    def admit(self) -> None:
        """Notes that the request which `wait` allowed goes out: the probe, if there is a pause."""
        self._probing = self._pauses > 0

    def withdraw(self) -> None:
        """Notes that it did not go out, or that its end says nothing."""
        self._probing = False

    def answered(self) -> None:
        """The server works: a pause is over."""
        if self._pauses:
            self._recent.clear()
        self._recent.append(True)
        self._pauses, self._probing, self._silent_since = 0, False, None

    def failed(self, *, sent: float, now: float) -> None:
        """A request failed. One sent before the last pause began tells nothing new."""
        if sent < self._paused_at:
            return
        if self._silent_since is None:
            self._silent_since = now
        self._recent.append(False)
        enough = len(self._recent) >= _ENOUGH
        if self._probing or (enough and 2 * sum(self._recent) < len(self._recent)):
            pause = self.patience.cool_down_s * 2.0 ** min(self._pauses, 30)
            self._pauses, self._probing, self._paused_at = self._pauses + 1, False, now
            self._until = now + min(pause, self.patience.longest_backoff_s)

    def out(self, *, now: float) -> bool:
        """Whether the server has been failing for so long that it counts as unavailable."""
        since = self._silent_since
        return self._pauses > 0 and since is not None and now - since >= self.patience.outage_s


class Governor:
    """All of these for one endpoint.

    Args:
      concurrency: The most requests in flight.
      per_minute: Requests and tokens; 0 for no limit.
      patience: For the circuit.
    """

    def __init__(self, *, concurrency: int, per_minute: tuple[int, int], patience: Patience):
        self.limit = Limit(concurrency)
        self.circuit = Circuit(patience)
        self._requests, self._tokens = (Bucket(amount) for amount in per_minute)
        self._quiet_until = -math.inf
        self.in_flight = 0

    def wait(self, tokens: int, *, now: float) -> float:
        """Seconds until a request of so many tokens may go out; `inf`: when something landed."""
        if self.in_flight >= self.limit.now:
            return math.inf
        return max(
            self._quiet_until - now,
            self.circuit.wait(now=now),
            self._requests.wait(1, now=now),
            self._tokens.wait(tokens, now=now),
            0.0,
        )

    def admit(self, tokens: int, *, now: float) -> None:
        """Books the request that `wait` has just allowed."""
        self._requests.take(1, now=now)
        self._tokens.take(tokens, now=now)
        self.circuit.admit()
        self.in_flight += 1

    def withdraw(self, tokens: int, *, now: float) -> None:
        """Takes back an admission: the request was not sent."""
        self._requests.take(-1, now=now)
        self._tokens.take(-tokens, now=now)
        self.circuit.withdraw()
        self.in_flight -= 1

    def land(self, fault: Fault | None, *, sent: float, now: float, unused_tokens: int = 0) -> None:
        """Books the end of a request.

        Args:
          fault: What it brought instead of an answer; None for an answer.
          sent, now: Seconds.
          unused_tokens: Of those admitted.
        """
        self.in_flight -= 1
        self._tokens.take(-unused_tokens, now=now)
        if fault is None:
            self.limit.rise()
            self.circuit.answered()
        elif fault.kind in _TROUBLE:
            self.circuit.failed(sent=sent, now=now)
        else:  # a server that refuses politely is well
            self.circuit.answered()
            if fault.kind == "rate limit":
                self.limit.cut(sent=sent, now=now)

    def quiet(self, seconds: float, *, now: float) -> None:
        """Holds everyone back: the server asked for it."""
        self._quiet_until = max(self._quiet_until, now + seconds)
