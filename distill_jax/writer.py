"""Prompts to completions by an encoder-decoder: what `generate` is for decoders.

Letters: Q questions of a batch, S answers of a question.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from distill_jax.config import ExamConfig
from distill_jax.generate import read_completion, row_keys
from distill_jax.records import GREEDY, Completion
from distill_jax.student.architecture import EncoderDecoderConfig
from distill_jax.student.model import Params, abstract_params, logical_axes
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import BATCH, EXAM_RULES, shardings
from distill_jax.student.step import num_row_shards
from distill_jax.student.writing import Questions, Written, write
from distill_jax.tokenizer import Tokenizer, padded_length

ROWS = 128
"""Answers written at the same time, over all devices, unless the config says how many."""


@dataclass(frozen=True)
class Writer:
    """Completes prompts with an encoder-decoder; made by `make_writer`."""

    tokenizer: Tokenizer
    mesh: Mesh
    exam: ExamConfig
    lay_out: Callable[[Params], Params]
    write: Callable[[Params, Questions], Written]

    def __call__(
        self,
        params: Params,
        prompts: Sequence[str],
        ids: Sequence[str],
        *,
        samples: int,
        seed: int,
        round_index: int,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Answers each prompt once greedily and `samples` times at random.

        Args, yields and raises as `generate.Generate`; no prompt is too long.
        """
        if len(ids) != len(prompts):
            raise ValueError(f"each prompt needs an id; got {len(prompts)} and {len(ids)} ids.")
        encoded = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        ordered = sorted(range(len(prompts)), key=lambda i: (len(encoded[i]), i))
        shards = num_row_shards(self.mesh)
        size = max(1, (self.exam.slots or ROWS) // (1 + samples) // shards) * shards
        # Batches are the same whatever is done, so that a run that goes on draws what it would.
        batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
        owed = set(range(len(prompts))) - set(done)
        batches = [batch for batch in batches if owed.intersection(batch)]
        if not batches:
            return
        laid_out = self.lay_out(params)
        for batch in batches:
            keys = [row_keys(seed, round_index, ids[i], 1 + samples) for i in batch]
            questions = self._ask([encoded[i] for i in batch], np.stack(keys), size)
            # Fetched before the next batch is sent: CPU meshes lock up on long queues.
            written = jax.device_get(self.write(laid_out, questions))
            for row, index in enumerate(batch):
                if index in owed:
                    yield index, self._read(written, row)

    def _ask(self, prompts: Sequence[Sequence[int]], keys: np.ndarray, size: int) -> Questions:
        """A batch of `size` questions; those that only fill it are not answered."""
        tokens = np.zeros((size, padded_length(max(map(len, prompts)))), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)], mask[row, : len(prompt)] = prompt, True
        greedy, sampled = self.exam.max_new_tokens
        limits = np.full(keys.shape[:2], sampled, np.int32)
        limits[:, GREEDY] = greedy
        fill = size - len(prompts)
        limits, keys = (np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1)) for x in (limits, keys))
        layout = NamedSharding(self.mesh, BATCH)
        arrays = (tokens, mask, limits, keys)
        return Questions(
            *(jax.make_array_from_callback(x.shape, layout, x.__getitem__) for x in arrays)
        )

    def _read(self, written: Written, row: int) -> tuple[Completion, ...]:
        answers = zip(*(part[row] for part in written), strict=True)
        return tuple(
            read_completion(self.tokenizer, tokens[:count].tolist(), stopped=bool(stopped))
            for tokens, count, stopped in answers
        )


def make_writer(
    config: EncoderDecoderConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    exam: ExamConfig,
    compute_dtype: DTypeLike,
) -> Writer:
    """Binds all that stays the same from exam to exam; compiles nothing yet.

    Args:
      config: What the student looks like.
      tokenizer: Its tokenizer.
      mesh: Devices; questions are spread over the axes `data` and `fsdp`.
      exam: Sampling and limits.
      compute_dtype: Of products and caches. Logits and what is drawn from them are float32.
    """
    axes = logical_axes(config)
    layout = shardings(mesh, axes, abstract_params(config), EXAM_RULES)

    def lay_out(params: Params) -> Params:
        # Norms work in float32 whatever the states are: their weights are not rounded.
        return jax.tree.map(
            lambda names, weight: weight if "norm" in names else weight.astype(compute_dtype),
            axes,
            params,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    answer = partial(
        write,
        config,
        longest=max(exam.max_new_tokens),
        end_id=-1 if tokenizer.end_id is None else tokenizer.end_id,
        num_tokens=tokenizer.num_tokens,
        sampling=Sampling(exam.temperature, exam.top_k, exam.top_p),
        dtype=jnp.dtype(compute_dtype),
    )
    return Writer(
        tokenizer=tokenizer,
        mesh=mesh,
        exam=exam,
        lay_out=jax.jit(lay_out, out_shardings=layout),
        write=jax.jit(answer, out_shardings=NamedSharding(mesh, PartitionSpec())),
    )
