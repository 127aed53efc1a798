"""What a step makes small: the language-modelling loss, and what is learned from mistakes.

Letters: S row shards, T tokens of a shard's line, C the first of them, which may predict something,
B rows, D width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from distill_jax.student.losses import (
    SoftTargets,
    Targets,
    dpo_costs,
    prediction_costs,
    prediction_loss,
    ranking_costs,
    triplet_costs,
)
from distill_jax.student.model import ModelConfig, Params, head_params, logits
from distill_jax.student.plain import AnyBatch

Reflection = Literal["triplet", "ranking", "dpo", "none"]
LIKELIHOODS = ("ranking", "dpo")
"""Those that compare likelihoods of anchor and negative, not states."""

States = Callable[[Params, Any], Float[Array, "S T D"]]
"""`tree.tree_states` or `plain.plain_states` with the student and its layout bound."""


@dataclass(frozen=True)
class Objective:
    """What the step makes small: `lm + reflection_weight * reflection`.

    Attributes:
      prompt_weight: Weight of a prompt token in the language-modelling loss; the target's is 1.
      reflection: `triplet`, `ranking`, `dpo`, or `none`: formulas and sources in `losses`.
      reflection_weight: Weight of the reflection loss.
      margin: Of the triplet loss, a cosine distance; of ranking, nats per token.
      beta: Of DPO: how much a log ratio counts.
      prefix_gradient: Whether the triplet loss's gradient reaches the prompt's states. The value
        is the same either way; the original code cuts it, the paper's equation does not.
      alternatives: How many other tokens may share the place of a target; 0: targets are hard.
    """

    prompt_weight: float = 0.1
    reflection: Reflection = "triplet"
    reflection_weight: float = 0.5
    margin: float = 1.0
    beta: float = 0.1
    prefix_gradient: bool = False
    alternatives: int = 0


class Losses(NamedTuple):
    """Sums over rows; `Counts` holds what to divide them by."""

    lm: Float[Array, ""]
    reflection: Float[Array, ""]


def losses(
    config: ModelConfig,
    params: Params,
    batch: AnyBatch,
    objective: Objective,
    *,
    states: States,
    reference: Params | None = None,
) -> Losses:
    """Both losses of a microbatch, as sums over its rows.

    The language-modelling loss weighs `-log p` of every token of demonstrations, question and
    rationale but the very first: `prompt_weight` in the prompt, 1 in the target. The shared
    demonstrations have one value in all rows and are counted once per real row. Where a target
    shares its place with others, the cross-entropy with their shares stands in for `-log p`.

    Args:
      config: What the student looks like.
      params: Its weights.
      batch: One microbatch, without axis M.
      objective: Weights and margin.
      states: Computes the tokens' states.
      reference: The weights that DPO compares with; the other objectives need none.

    Source:
      Wang et al. (EMNLP 2023), equations 3 to 5, with the released code's weights.
    """
    hidden = states(params, batch)
    if objective.reflection in LIKELIHOODS:
        return _compare_likelihoods(
            config, params, batch, objective, hidden, states=states, reference=reference
        )
    lm = _lm_loss(config, params, batch, hidden)
    if objective.reflection == "none":
        return Losses(lm, jnp.zeros((), jnp.float32))
    ends = jax.vmap(lambda line, where: line[where])(hidden, batch.ends)
    anchor, positive, negative = ends.reshape(-1, 3, ends.shape[-1]).swapaxes(0, 1)
    reflection = triplet_costs(
        anchor, positive, negative, batch.valid.ravel(), margin=objective.margin
    )
    return Losses(lm, jnp.sum(reflection))


def _compare_likelihoods(
    config: ModelConfig,
    params: Params,
    batch: AnyBatch,
    objective: Objective,
    hidden: Float[Array, "S T D"],
    *,
    states: States,
    reference: Params | None,
) -> Losses:
    """The losses of ranking and DPO, from `-log p` of every target."""
    costs = prediction_costs(*_predictions(config, params, batch, hidden))
    soft = batch.others is not None
    lm = _lm_loss(config, params, batch, hidden) if soft else jnp.sum(batch.weights * costs)
    anchor, negative, lengths = _likelihoods(batch, costs)
    if objective.reflection == "ranking":
        reflection = ranking_costs(
            anchor / lengths[0], negative / lengths[1], batch.valid, margin=objective.margin
        )
        return Losses(lm, jnp.sum(reflection))
    assert reference is not None, "DPO compares with the weights that the round began with"
    before = prediction_costs(*_predictions(config, reference, batch, states(reference, batch)))
    then = jax.lax.stop_gradient(_likelihoods(batch, before)[:2])
    ratios = (anchor - then[0], negative - then[1])
    return Losses(lm, jnp.sum(dpo_costs(*ratios, batch.valid, beta=objective.beta)))


class Readings(NamedTuple):
    """What a student makes of the anchor and of the negative of every row, in this order."""

    likelihoods: Float[Array, "S B 2"]  # `log p` behind the prompt, in nats
    lengths: Float[Array, "S B 2"]  # tokens
    states: Float[Array, "S B 2 D"]  # after the final norm, at the last token


def read_pairs(config: ModelConfig, params: Params, batch: AnyBatch, *, states: States) -> Readings:
    """How likely a student finds anchors and negatives, and the states that stand for them.

    Args:
      config: What the student looks like.
      params: Its weights.
      batch: One microbatch, without axis M, packed for an objective of `LIKELIHOODS`.
      states: Computes the tokens' states.
    """
    hidden = states(params, batch)
    costs = prediction_costs(*_predictions(config, params, batch, hidden))
    anchor, negative, lengths = _likelihoods(batch, costs)
    ends = jax.vmap(lambda line, where: line[where])(hidden, batch.ends[..., ::2])
    return Readings(
        jnp.stack([anchor, negative], axis=-1),
        jnp.stack(lengths, axis=-1),
        ends.astype(jnp.float32),
    )


def _predictions(
    config: ModelConfig, params: Params, batch: AnyBatch, hidden: Float[Array, "S T D"]
) -> tuple[Array, Array, Params, Callable[..., Array]]:
    """The states that predict something, what, and how their logits are made."""
    first = hidden[:, : batch.targets.shape[1]]
    return first, batch.targets, head_params(config, params), partial(logits, config)


def _lm_loss(
    config: ModelConfig, params: Params, batch: AnyBatch, hidden: Float[Array, "S T D"]
) -> Float[Array, ""]:
    first, tokens, head, score = _predictions(config, params, batch, hidden)
    targets: Targets = tokens
    if batch.others is not None and batch.shares is not None:
        targets = SoftTargets(tokens, batch.others, batch.shares)
    return prediction_loss(first, targets, head, score, batch.weights)


def _likelihoods(
    batch: AnyBatch, costs: Float[Array, "S C"]
) -> tuple[Float[Array, "S B"], Float[Array, "S B"], tuple[Array, Array]]:
    """`log p` of every anchor and negative behind its prompt, and their lengths in tokens."""
    rows = batch.valid.shape[1]

    def total(values: Array) -> Array:
        def one(value: Array, owner: Int[Array, " C"]) -> Array:
            return jnp.zeros(2 * rows).at[owner].add(value, mode="drop")

        return jax.vmap(one)(values, batch.owners).reshape(-1, rows, 2)

    sums, lengths = -total(costs), jnp.maximum(total(jnp.ones_like(costs)), 1.0)
    return sums[..., 0], sums[..., 1], (lengths[..., 0], lengths[..., 1])
