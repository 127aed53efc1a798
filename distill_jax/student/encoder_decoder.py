"""The encoder-decoder: an encoder that sees all of a text, and a decoder that attends to it.

Letters: N layers of the decoder, Q texts of the encoder, L their tokens, B texts of the decoder, T
their tokens, C places for keys, n heads, H head dim, D width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.blocks import Attention, Mlp, Norm, Remat, matrix, recompute


class Memory(NamedTuple):
    """What the decoder attends to of the encoder's texts, in every layer."""

    keys: Float[Array, "N Q L n H"]
    values: Float[Array, "N Q L n H"]
    mask: Bool[Array, "Q L"]


class Cache(NamedTuple):
    """What the decoder has computed of its own texts, with room for more."""

    keys: Float[Array, "N B C n H"]
    values: Float[Array, "N B C n H"]


class Layer(nnx.Module):
    """Attention within a text, in decoders attention to the encoder's, and the MLP."""

    def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs, *, decodes: bool):
        size = {"norm": config.width}
        self.attention_norm = Norm(config, size)
        self.attention = Attention(config, rngs)
        self.cross_norm = Norm(config, size) if decodes else None
        self.cross = Attention(config, rngs) if decodes else None
        self.mlp_norm = Norm(config, size)
        self.mlp = Mlp(config, rngs)


class EncoderDecoder(nnx.Module):
    """All weights of a student; the layers of either stack lie on an axis named `layers`."""

    def __init__(self, config: EncoderDecoderConfig, rngs: nnx.Rngs):
        size, rows = {"norm": config.width}, {"vocab": config.padded_vocab}
        width, std = {"embed": config.width}, config.width**-0.5
        distances = {"buckets": config.buckets, "heads": config.heads}
        self.config = config
        self.embedding = matrix(rngs, rows | width, std=1.0)
        self.encoder_distances = matrix(rngs, distances, std=std)
        self.encoder = _stack(config, rngs, config.encoder_layers, decodes=False)
        self.encoder_norm = Norm(config, size)
        self.decoder_distances = matrix(rngs, distances, std=std)
        self.decoder = _stack(config, rngs, config.layers, decodes=True)
        self.norm = Norm(config, size)
        self.head = None if config.tied_head else matrix(rngs, rows | width, std=1.0)

    def encode(
        self,
        tokens: Int[Array, "Q L"],
        mask: Bool[Array, "Q L"],
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        constrain: Callable[[Array], Array] = lambda x: x,
    ) -> Float[Array, "Q L D"]:
        """The states of texts in which every token sees all others.

        Args:
          tokens: Ids.
          mask: True where a real token stands, on whichever side padding is. States of other
            tokens are finite and mean nothing.
          dtype: Of products and states. Norms and softmax are float32.
          remat: What the backward pass recomputes.
          constrain: Applied to the states between layers, to keep them laid out on a mesh.
        """
        places = jnp.arange(tokens.shape[1])
        bias = self._weigh_distances(self.encoder_distances, places, places, both_ways=True)

        def look(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            return attend(query, key, value, mask[:, None], bias), None

        def step(x: Array, layer: Layer) -> tuple[Array, None]:
            change, _ = layer.attention(layer.attention_norm(x), None, look)
            x = x + change
            return constrain(x + layer.mlp(layer.mlp_norm(x))), None

        x = constrain(self.embedding[...][tokens].astype(dtype))
        x, _ = jax.lax.scan(recompute(step, remat), x, self.encoder)
        return self.encoder_norm(x)

    def remember(self, states: Float[Array, "Q L D"], mask: Bool[Array, "Q L"]) -> Memory:
        """What the decoder attends to of encoded texts."""
        keys, values = jax.lax.map(lambda layer: layer.cross.offer(states, None), self.decoder)
        return Memory(keys, values, mask)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        memory: Memory,
        cache: Cache | None = None,
        start: Int[Array, ""] | int = 0,
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        constrain: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """The states of texts that each attend to one of the encoder's.

        Text b attends to the encoder's text b // (B // Q), which is not copied for it. No mask is
        needed: padding stands behind the text, where no token of it looks.

        Args:
          tokens: What the texts go on with: `start_id`, then ids.
          memory: From `remember`; Q divides B.
          cache: What stands before `tokens`, as an earlier call returned it, or empty and large
            enough for all that is to come; None where nothing stands there and nothing will come.
          start: How many tokens stand before.
          dtype, remat, constrain: As in `encode`.

        Returns:
          The states that the output projection reads, and the cache with these tokens.
        """
        room = tokens.shape[1] if cache is None else cache.keys.shape[2]
        places, known = start + jnp.arange(tokens.shape[1]), jnp.arange(room)
        bias = self._weigh_distances(self.decoder_distances, places, known, both_ways=False)
        before = (known[None] <= places[:, None])[None]

        def step(x: Array, parts: tuple[Layer, Any, Any]) -> tuple[Array, Any]:
            layer, (seen_keys, seen_values), own = parts
            assert layer.cross is not None and layer.cross_norm is not None

            def look(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
                if own is not None:
                    key, value = (
                        jax.lax.dynamic_update_slice(x, y, (0, start, 0, 0))
                        for x, y in zip(own, (key, value), strict=True)
                    )
                return attend(query, key, value, before, bias), (key, value)

            change, kept = layer.attention(layer.attention_norm(x), None, look)
            x = x + change
            query = layer.cross.ask(layer.cross_norm(x), None)
            x = x + layer.cross.finish(attend(query, seen_keys, seen_values, memory.mask[:, None]))
            return constrain(x + layer.mlp(layer.mlp_norm(x))), kept

        x = constrain(self.embedding[...][tokens].astype(dtype))
        parts = (self.decoder, (memory.keys, memory.values), cache)
        x, kept = jax.lax.scan(recompute(step, remat), x, parts)
        return self.norm(x), Cache(*kept)

    def make_cache(self, rows: int, room: int, *, dtype: DTypeLike) -> Cache:
        """An empty cache for `rows` texts of at most `room` tokens."""
        config = self.config
        shape = (config.layers, rows, room, config.heads, config.head_dim)
        return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def _weigh_distances(
        self,
        table: nnx.Param,
        places: Int[Array, " T"],
        known: Int[Array, " C"],
        *,
        both_ways: bool,
    ) -> Float[Array, "n T C"]:
        """What the distance from each token to each other adds to their score."""
        config = self.config
        buckets = jnp.asarray(
            make_buckets(config.buckets, config.max_distance, both_ways=both_ways)
        )
        far = config.max_distance
        index = jnp.clip(known[None] - places[:, None], -far, far) + far
        return jnp.moveaxis(table[...].astype(jnp.float32)[buckets[index]], -1, 0)


def _stack(config: EncoderDecoderConfig, rngs: nnx.Rngs, layers: int, *, decodes: bool) -> Layer:
    make = nnx.vmap(
        lambda rngs: Layer(config, rngs, decodes=decodes),
        in_axes=0,
        out_axes=0,
        transform_metadata={nnx.PARTITION_NAME: "layers"},
    )
    return nnx.split_rngs(splits=layers)(make)(rngs)


def make_buckets(count: int, max_distance: int, *, both_ways: bool) -> np.ndarray:
    """The bucket of every distance from `-max_distance` to `max_distance`.

    Half of the buckets, of either direction, hold one distance each, the others grow as its
    logarithm does. Rounded as in float32, like the published code.

    Args:
      count: Buckets in all.
      max_distance: From here on all distances are in the last bucket.
      both_ways: Whether tokens behind one's own have buckets of their own. If not, they are as
        far as one's own.

    Source:
      Raffel et al., "Exploring the Limits of Transfer Learning" (JMLR 2020), section 2.1.

    Example:
      >>> make_buckets(8, 6, both_ways=False).tolist()
      [7, 6, 4, 3, 2, 1, 0, 0, 0, 0, 0, 0, 0]
    """
    distance = np.arange(-max_distance, max_distance + 1)
    first = np.where(distance > 0, count // 2, 0) if both_ways else 0
    each = count // 2 if both_ways else count
    distance = np.abs(distance) if both_ways else -np.minimum(distance, 0)
    near = each // 2
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(near))
    growth = ratio / np.float32(math.log(max_distance / near)) * np.float32(each - near)
    far = np.minimum(near + growth.astype(np.int32), each - 1)
    return first + np.where(distance < near, distance, far)


def attend(
    query: Float[Array, "B T n H"],
    keys: Float[Array, "G C n H"],
    values: Float[Array, "G C n H"],
    visible: Bool[Array, "g t C"],
    bias: Float[Array, "n T C"] | None = None,
) -> Float[Array, "B T n H"]:
    """One softmax over all keys of a group, in float32.

    Args:
      query: Of B texts, so many to a group; scores are not scaled.
      keys: Of a group.
      values: The same.
      visible: For each group, or for all where g is 1, which keys each token sees; for all tokens
        where t is 1.
      bias: Added to the scores.
    """
    rows = (keys.shape[0], -1, *query.shape[1:])
    scores = jnp.einsum(
        "gbtnh,gcnh->gbntc", query.reshape(rows), keys, preferred_element_type=jnp.float32
    )
    if bias is not None:
        scores += bias[None, None]
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("gbntc,gcnh->gbtnh", weights, values).reshape(query.shape)
