"""The original training step in PyTorch and transformers, written from the method's description.

One full pass with gradient for the language-modelling loss, logits of every token included; a pass
over the prompts without gradient; three suffix passes that continue its cache, for the triplet
loss. Rows are padded to the longest of the batch. `bench_step.py` times it and the tests compare
with it, so both speak of the same thing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import DynamicCache, PreTrainedModel

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Sample:
    """Token ids of one training sample; no positive and negative where it has no pair."""

    prompt: Sequence[int]
    anchor: Sequence[int]
    positive: Sequence[int] = ()
    negative: Sequence[int] = ()


def original_losses(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    *,
    prompt_weight: float,
    margin: float,
    prefix_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """The language-modelling loss over all predicted tokens, and the mean triplet loss.

    Args:
      model: A decoder of transformers.
      samples: The rows of a batch.
      prompt_weight: Weight of a prompt token's prediction; the target's is 1.
      margin: Of the triplet loss, a cosine distance.
      prefix_gradient: False cuts the triplet loss at the prompt as the released code does. True is
        the paper's equation: three full passes with gradient instead of prefix and suffixes.
    """
    device = next(model.parameters()).device
    ids, mask = pad([[*sample.prompt, *sample.anchor] for sample in samples], device)
    scores = model(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    costs = cross_entropy(scores.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    places = torch.arange(1, ids.shape[1], device=device)[None]
    starts = torch.tensor([len(sample.prompt) for sample in samples], device=device)[:, None]
    weights = torch.where(places < starts, prompt_weight, 1.0) * mask[:, 1:]
    lm = (weights * costs.view_as(weights)).sum() / mask[:, 1:].sum()

    pairs = [sample for sample in samples if sample.positive and sample.negative]
    if not pairs:
        return lm, torch.zeros((), device=device)
    prompts = [sample.prompt for sample in pairs]
    branches = (
        [sample.anchor for sample in pairs],
        [sample.positive for sample in pairs],
        [sample.negative for sample in pairs],
    )
    if prefix_gradient:
        whole = [[[*p, *x] for p, x in zip(prompts, texts, strict=True)] for texts in branches]
        states = [full_states(model, texts) for texts in whole]
    else:
        states = suffix_states(model, prompts, branches)
    anchor, positive, negative = (state.float() for state in states)
    right, wrong = (cosine_similarity(anchor, other) for other in (positive, negative))
    return lm, torch.clamp(margin - right + wrong, min=0.0).mean()


def full_states(model: PreTrainedModel, texts: Texts) -> Tensor:
    """The last entry of the hidden states at each text's last token, with gradient everywhere."""
    ids, mask = pad(texts, next(model.parameters()).device)
    out = model(ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
    return out.hidden_states[-1][torch.arange(len(texts)), mask.sum(1) - 1]


def suffix_states(
    model: PreTrainedModel, prompts: Texts, branches: Sequence[Texts]
) -> list[Tensor]:
    """The same behind prompts that were read without gradient, once for all branches."""
    device = next(model.parameters()).device
    ids, mask = pad(prompts, device, left=True)
    with torch.no_grad():
        places = (mask.cumsum(1) - 1).clamp(min=0)
        past = model(ids, attention_mask=mask, position_ids=places, use_cache=True).cache
    states = []
    for texts in branches:
        more, more_mask = pad(texts, device)
        out = model(
            more,
            attention_mask=torch.cat([mask, more_mask], dim=1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(more.shape[1], device=device),
            cache=DynamicCache((layer.keys, layer.values) for layer in past.layers),
            output_hidden_states=True,
        )
        states.append(out.hidden_states[-1][torch.arange(len(texts)), more_mask.sum(1) - 1])
    return states


def pad(texts: Texts, device: torch.device, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Texts as one array padded on one side, and 1 where a token stands."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        place = slice(longest - len(text), None) if left else slice(len(text))
        ids[row, place], mask[row, place] = torch.tensor(list(text)), 1
    return ids.to(device), mask.to(device)
