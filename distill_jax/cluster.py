"""Starts JAX on all processes of a run, and joins this one to the others.

Who they are is given, or JAX asks the cluster: TPU pods, Slurm, Kubernetes, Open MPI.
"""

import contextlib
import os
import sys
from collections.abc import Iterator

import jax
from jax._src import distributed  # the only way to the store that all processes share

from distill_jax.membership import Member, meet
from distill_jax.processes import Limits, Team


@contextlib.contextmanager
def join(member: Member | None, limits: Limits) -> Iterator[None]:
    """Works together with the other processes while the `with` block runs. Before any use of JAX.

    An error that leaves the block ends all of them, with the same exit code and sentence.

    Args:
      member: From `find_member`; None if this process is alone.
      limits: How long to wait for the others.

    Raises:
      ProcessMissing: not all of them came.
      ConfigError: two are told to be the same one, or process 0 can't listen.
    """
    if member is None:
        yield
        return
    place: dict[str, object] = {}
    if member.coordinator:
        meet(member, limits.start)
        place = {
            "coordinator_address": member.coordinator,
            "num_processes": member.count,
            "process_id": member.index,
            "cluster_detection_method": "deactivate",
        }
    # Collectives on CPUs tell stdout who is connected; only results belong there.
    sys.stdout = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    # JAX would end this process from native code, without a word that helps, as soon as another
    # one is gone. The team's own watch says who it was.
    jax.config.update("jax_enable_recoverability", True)
    jax.distributed.initialize(  # pyright: ignore[reportCallIssue]
        **place,  # pyright: ignore[reportArgumentType]
        initialization_timeout=int(limits.start),
        heartbeat_timeout_seconds=2 * int(limits.lost) + 1,
    )
    state = distributed.global_state
    assert state.client is not None
    with Team(state.client, index=state.process_id, count=state.num_processes, limits=limits):
        yield
    if state.process_id == 0:
        jax.distributed.shutdown()
