"""The original training step in PyTorch, row by row, written from the method's description.

One full pass for the language-modelling loss; a pass over the prompt without gradient whose cache
three suffix passes continue, for the triplet loss; weights and denominator as released.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import cosine_similarity


@dataclass(frozen=True)
class Sample:
    """Token ids of one training sample; no positive and negative where it has no pair."""

    prompt: Sequence[int]
    anchor: Sequence[int]
    positive: Sequence[int] = ()
    negative: Sequence[int] = ()


def original_losses(
    model: torch.nn.Module,
    samples: Sequence[Sample],
    *,
    prompt_weight: float,
    margin: float,
    prefix_gradient: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The language-modelling loss over all predicted tokens, and the mean triplet loss."""
    weighted, predicted, costs = torch.zeros(()), 0, []
    for sample in samples:
        ids = torch.tensor([[*sample.prompt, *sample.anchor]])
        log_p = model(ids).logits[0, :-1].log_softmax(-1)
        chosen = log_p.gather(1, ids[0, 1:, None])[:, 0]
        weights = torch.ones(ids.shape[1] - 1)
        weights[: len(sample.prompt) - 1] = prompt_weight
        weighted = weighted - (weights * chosen).sum()
        predicted += ids.shape[1] - 1
        if sample.positive and sample.negative:
            anchor, positive, negative = (
                last_state(model, sample.prompt, text, prefix_gradient=prefix_gradient)
                for text in (sample.anchor, sample.positive, sample.negative)
            )
            right, wrong = (cosine_similarity(anchor, x, dim=0) for x in (positive, negative))
            costs.append(torch.clamp(margin - right + wrong, min=0.0))
    mean = torch.stack(costs).mean() if costs else torch.zeros(())
    return weighted / predicted, mean


def last_state(
    model: torch.nn.Module, prompt: Sequence[int], text: Sequence[int], *, prefix_gradient: bool
) -> torch.Tensor:
    """The last entry of the hidden states at the text's last token, behind the prompt."""
    if prefix_gradient:
        ids = torch.tensor([[*prompt, *text]])
        return model(ids, output_hidden_states=True).hidden_states[-1][0, -1]
    with torch.no_grad():
        cache = model(torch.tensor([list(prompt)]), use_cache=True).past_key_values
    out = model(
        torch.tensor([list(text)]),
        past_key_values=copy.deepcopy(cache),
        output_hidden_states=True,
        use_cache=True,
    )
    return out.hidden_states[-1][0, -1]
