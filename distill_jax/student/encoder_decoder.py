"""The encoder-decoder: an encoder that sees all of a text, and a decoder that attends to it.

Letters: Q texts of the encoder, L their tokens, B texts of the decoder, T their tokens, C tokens
that are known, n heads, D width; g texts, or 1 where they do not differ.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Float32, Int

from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.attention import Segment, Stretch, attend
from distill_jax.student.blocks import Attention, Mlp, Norm, Remat, matrix, recompute


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
        places = jnp.arange(tokens.shape[1])[None]
        bias = self._weigh_distances(self.encoder_distances, places, places, both_ways=True)

        def look(query: Array, key: Array, value: Array) -> tuple[Array, None]:
            key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
            return _attend(query, Stretch(key, value, mask[:, None], bias=bias)), None

        def step(x: Array, layer: Layer) -> tuple[Array, None]:
            change, _ = layer.attention(layer.attention_norm(x), None, look)
            x = x + change
            return constrain(x + layer.mlp(layer.mlp_norm(x))), None

        x = constrain(self.embedding[...][tokens].astype(dtype))
        x, _ = jax.lax.scan(recompute(step, remat), x, self.encoder)
        return self.encoder_norm(x)

    def remember(self, states: Float[Array, "Q L D"], mask: Bool[Array, "Q L"]) -> Segment:
        """What the decoder attends to of encoded texts, in every layer."""
        keys, values = jax.lax.map(lambda layer: layer.cross.offer(states, None), self.decoder)
        places = jnp.broadcast_to(jnp.arange(mask.shape[1])[None], mask.shape)
        return Segment(keys.swapaxes(2, 3), values.swapaxes(2, 3), places, mask)

    def decode(
        self,
        tokens: Int[Array, "B T"],
        memory: Segment,
        before: Segment | None = None,
        places: Int[Array, "g T"] | None = None,
        *,
        dtype: DTypeLike,
        remat: Remat = "none",
        unroll: bool = False,
        constrain: Callable[[Array], Array] = lambda x: x,
    ) -> tuple[Float[Array, "B T D"], Segment]:
        """The states of texts that each attend to one of the encoder's.

        Without a route, text b attends to the encoder's text b // (B // Q), which is not copied for
        it. No mask is needed: padding stands behind the text, where no token of it looks.

        Args:
          tokens: What the texts go on with: `start_id`, then ids.
          memory: From `remember`; Q divides B.
          before: What earlier calls returned of the same texts, in groups that one text each asks;
            None where nothing stands before `tokens`.
          places: Of the tokens, counted as those in `before` are; None counts from 0.
          dtype, remat, constrain: As in `encode`.
          unroll: As in `model.forward`.

        Returns:
          The states that the output projection reads, and these tokens as a segment.
        """
        rows, length = tokens.shape
        places = jnp.arange(length)[None] if places is None else places
        weigh = partial(self._weigh_distances, self.decoder_distances, both_ways=False)
        near, far = weigh(places, places), None
        if before is not None:
            asking = places if before.route is None else places[before.route.rows[:, 0]]
            far = weigh(asking, before.positions)
        seen = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (rows, length, length))

        def step(x: Array, parts: tuple[Layer, Any, Any]) -> tuple[Array, Any]:
            layer, (text_keys, text_values), own = parts
            assert layer.cross is not None and layer.cross_norm is not None

            def look(query: Array, key: Array, value: Array) -> tuple[Array, Any]:
                key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
                stretches = [Stretch(key, value, seen, bias=near)]
                if before is not None:
                    sight = before.mask[:, None]
                    stretches.insert(0, Stretch(own[0], own[1], sight, before.route, far))
                return _attend(query, *stretches), (key, value)

            change, kept = layer.attention(layer.attention_norm(x), None, look)
            x = x + change
            query = layer.cross.ask(layer.cross_norm(x), None)
            text = Stretch(text_keys, text_values, memory.mask[:, None], memory.route)
            x = x + layer.cross.finish(_attend(query, text))
            return constrain(x + layer.mlp(layer.mlp_norm(x))), kept

        x = constrain(self.embedding[...][tokens].astype(dtype))
        of_before = None if before is None else (before.keys, before.values)
        parts = (self.decoder, (memory.keys, memory.values), of_before)
        x, (keys, values) = jax.lax.scan(recompute(step, remat), x, parts, unroll=unroll)
        positions = jnp.broadcast_to(places, tokens.shape)
        return self.norm(x), Segment(keys, values, positions, jnp.ones(tokens.shape, bool))

    def _weigh_distances(
        self,
        table: nnx.Param,
        places: Int[Array, "g T"],
        known: Int[Array, "g C"],
        *,
        both_ways: bool,
    ) -> Float32[Array, "g n T C"]:
        """What the distance from each token to each other adds to their score."""
        config = self.config
        buckets = jnp.asarray(
            make_buckets(config.buckets, config.max_distance, both_ways=both_ways)
        )
        far = config.max_distance
        index = jnp.clip(known[:, None] - places[:, :, None], -far, far) + far
        return jnp.moveaxis(table[...].astype(jnp.float32)[buckets[index]], -1, 1)


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


def _attend(query: Float[Array, "B T n H"], *stretches: Stretch) -> Float[Array, "B T n H"]:
    return attend(query, stretches, scale=1.0, cap=None)
