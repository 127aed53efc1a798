"""What any process wishes, known to all of them at the same step."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec


class Ballot:
    """The greatest wish of all processes, one step late so that the devices never wait for it.

    Example:
      >>> ballot = Ballot(jax.make_mesh((jax.device_count(),), ("data",)))
      >>> ballot.cast(2), ballot.cast(0), ballot.cast(0)
      (0, 2, 0)
    """

    def __init__(self, mesh: Mesh):
        """Every device of `mesh` brings the wish of its process."""
        self._layout = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._greatest = jax.jit(jnp.max, out_shardings=everywhere)
        self._last: jax.Array | None = None

    def cast(self, wish: int) -> int:
        """Hands in a wish, from 0; returns the greatest of the step before. All processes call."""
        own = np.full(1, wish, np.int32)
        wishes = jax.make_array_from_callback((self._size,), self._layout, lambda _: own)
        last, self._last = self._last, self._greatest(wishes)
        return 0 if last is None else int(last)
