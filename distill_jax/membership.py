"""Who this process is among those of its run, and whether all of them are there.

Nothing here imports JAX: it comes before.
"""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass

from distill_jax.config import ConfigError
from distill_jax.endings import INTERRUPTED
from distill_jax.processes import names

_RETRY_S = 0.2


class ProcessMissing(RuntimeError):
    """The processes of a run did not all come; names those that are missing."""

    exit_code = INTERRUPTED


@dataclass(frozen=True)
class Member:
    """Who this process is among those of its run.

    Attributes:
      coordinator: `host:port` of process 0, where it listens; "" has JAX ask the cluster.
      count: Of all processes.
      index: Of this one, from 0.
    """

    coordinator: str = ""
    count: int = 0
    index: int = -1


def find_member(
    coordinator: str | None,
    count: int | None,
    index: int | None,
    *,
    in_cluster: bool = False,
    environ: Mapping[str, str] = os.environ,
) -> Member | None:
    """Who this process is, from what is given or else from the cluster; None if it is alone.

    Args:
      coordinator: `host:port` of process 0.
      count: Of all processes.
      index: Of this process.
      in_cluster: There are others, and JAX can find out about them.
      environ: Tells that this is one of several tasks of Slurm, or of several hosts of a TPU pod.

    Raises:
      ConfigError: some of the three are given and others are not, or they don't fit.

    Example:
      >>> find_member("10.0.0.1:1234", 2, 1)
      Member(coordinator='10.0.0.1:1234', count=2, index=1)
      >>> find_member(None, None, None, environ={"TPU_WORKER_HOSTNAMES": "host-0,host-1"})
      Member(coordinator='', count=0, index=-1)
      >>> find_member(None, None, None, environ={}) is None
      True
    """
    if in_cluster:
        return Member()
    given = {"--coordinator": coordinator, "--processes": count, "--process": index}
    absent = [name for name, value in given.items() if value is None]
    if not absent:
        assert coordinator is not None and count is not None and index is not None
        return _check(Member(coordinator, count, index))
    if len(absent) < len(given):
        raise ConfigError(
            "several processes need --coordinator, --processes and --process together; "
            f"{' and '.join(absent)} is missing."
        )
    slurm = "SLURM_STEP_NODELIST" in environ and int(environ.get("SLURM_NTASKS", "1")) > 1
    hosts = environ.get("TPU_PROCESS_ADDRESSES", environ.get("TPU_WORKER_HOSTNAMES", ""))
    return Member() if slurm or "," in hosts or "MEGASCALE_NUM_SLICES" in environ else None


def _check(member: Member) -> Member:
    host, _, port = member.coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"--coordinator is the host:port of process 0, such as 10.0.0.1:8476; "
            f"got {member.coordinator!r}."
        )
    if not 0 <= member.index < member.count:
        raise ConfigError(
            f"--process counts from 0 to --processes - 1; got {member.index} of {member.count}."
        )
    return member


def meet(member: Member, limit_s: float) -> None:
    """Waits until all processes are there: JAX can't say which one is missing.

    Raises:
      ProcessMissing: after `limit_s` seconds, in every process that came; names the others.
      ConfigError: two are told to be the same one, or process 0 can't listen.
    """
    deadline = time.monotonic() + limit_s
    if member.index:
        reply = _call(member, deadline, limit_s)
    else:
        reply = _receive_all(member, deadline, limit_s)
    if reply:
        raise ProcessMissing(reply)


def _receive_all(member: Member, deadline: float, limit_s: float) -> str:
    """Lets all others call; returns what is wrong, which they are told, or an empty string."""
    port = int(member.coordinator.rpartition(":")[2])
    calls: dict[int, socket.socket] = {}
    problem = ""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_listen(port))
        while len(calls) < member.count - 1 and not problem:
            listener.settimeout(max(deadline - time.monotonic(), 0.01))
            try:
                call = stack.enter_context(listener.accept()[0])
            except TimeoutError:
                missing = sorted(set(range(1, member.count)) - set(calls))
                problem = f"{names(missing)} did not come within {limit_s:.0f} s"
                break
            index = int.from_bytes(call.recv(4))
            if index in calls:
                problem = f"two processes were started with --process {index}"
            calls[index] = call
        for call in calls.values():
            call.sendall(problem.encode() or b"\n")
    return problem


def _listen(port: int) -> socket.socket:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        return socket.create_server(
            ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6
        )
    except OSError as error:
        raise ConfigError(
            f"process 0 can't listen at port {port} of --coordinator ({error.strerror}); "
            "name a free one."
        ) from None


def _call(member: Member, deadline: float, limit_s: float) -> str:
    """Calls process 0, and returns what it says is wrong."""
    host, _, port = member.coordinator.rpartition(":")
    while True:
        left = deadline - time.monotonic()
        try:
            with socket.create_connection((host.strip("[]"), int(port)), max(left, 1.0)) as line:
                line.sendall(member.index.to_bytes(4))
                line.settimeout(left + limit_s)  # process 0 may have come later
                return line.makefile().read().strip()
        except OSError as error:
            if left < _RETRY_S:
                reason = error.strerror or "no answer"
                where = f"at {member.coordinator} within {limit_s:.0f} s"
                return f"process 0 did not answer {where}: {reason}"
            time.sleep(_RETRY_S)
