"""Prompts to completions: tokenizer and batches around `student.decode`.

Letters: Q questions of a batch, R rows of a question, L prompt tokens.
"""

import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from distill_jax.config import ExamConfig
from distill_jax.records import GREEDY, Completion
from distill_jax.student.decode import Answers, Prompts, Stage, Stops, answer, plan_stages
from distill_jax.student.model import (
    ModelConfig,
    Params,
    Segment,
    abstract_params,
    forward,
    logical_axes,
)
from distill_jax.student.sampling import Sampling
from distill_jax.student.sharding import BATCH, EXAM_RULES, shardings
from distill_jax.tokenizer import Tokenizer, common_length, padded_length

BLANK_LINE = "\n\n"

REPLICAS = ("data", "fsdp")
"""Mesh axes along which the exam holds copies of the weights."""


class _Asked(NamedTuple):
    """A prompt to be answered."""

    index: int  # among the prompts given
    tokens: list[int]  # behind those that all prompts begin with, at least one
    id: str


@dataclass(frozen=True)
class Generate:
    """Completes prompts with the student; made by `make_generate`."""

    config: ModelConfig
    tokenizer: Tokenizer
    mesh: Mesh
    exam: ExamConfig
    stops: Stops
    batch_questions: int  # Q: as asked, rounded up to what the devices share evenly
    lay_out: Callable[[Params], Params]  # from any layout to that of the exam
    prefill: Callable[..., Segment]
    answer: Callable[..., Answers]

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

        Prompts of similar length share a batch, and a batch is made up of the same prompts
        whatever `done` says: what an interrupted call still owes comes out bit for bit as it would
        have. Other batch sizes, prompts or devices change how sums are rounded, hence a token only
        where two are as good as equal.

        Args:
          params: The student's weights, in any layout on the mesh. Laid out for the exam once.
          prompts: What to complete. Their common first tokens are computed once.
          ids: An id for each prompt. What is drawn depends on seed, round, id and sample alone.
          samples: Completions drawn per prompt, from 0.
          seed: Of the run.
          round_index: Of the weights.
          done: Indices of prompts to leave out. A batch with nothing else is not computed.

        Yields:
          The index of a prompt, and its completions: the greedy one, then the samples. In no
          particular order, each prompt once. A text ends before its first blank line and before
          the end token. A prompt that fills the student's context gets empty completions that
          count as cut.

        Raises:
          ValueError: there are not as many ids as prompts; raised with the first result.
        """
        if len(ids) != len(prompts):
            raise ValueError(f"each prompt needs an id; got {len(prompts)} and {len(ids)} ids.")
        done = set(done)
        asked, common = self._ask(prompts, ids)
        for index in sorted(set(range(len(prompts))) - {a.index for a in asked} - done):
            yield index, (Completion("", "length", 0),) * (1 + samples)
        batches = [batch for batch in self._batches(asked) if {a.index for a in batch} - done]
        if not batches:
            return
        laid_out = self.lay_out(params)
        shared = self._shared(laid_out, common)
        stages = plan_stages(
            greedy=self.exam.greedy_max_new_tokens,
            sampled=self.exam.max_new_tokens,
            samples=samples,
        )
        for batch in batches:
            keys = np.stack([_keys(seed, round_index, a.id, 1 + samples) for a in batch])
            arrays = self._arrays(batch, len(common), keys)
            # Fetched before the next batch is sent: CPU meshes lock up on long queues.
            answers = jax.device_get(
                self.answer(laid_out, shared, arrays, self.stops, stages=stages)
            )
            for row, a in enumerate(batch):
                if a.index not in done:
                    yield a.index, self._completions(answers, row)

    def _ask(self, prompts: Sequence[str], ids: Sequence[str]) -> tuple[list[_Asked], list[int]]:
        """The prompts that leave room for an answer, and the tokens that they all begin with."""
        encoded = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        fit = [i for i, tokens in enumerate(encoded) if len(tokens) < self.config.max_positions]
        common = common_length([encoded[i] for i in fit])
        asked = [_Asked(i, encoded[i][common:], ids[i]) for i in fit]
        return asked, encoded[fit[0]][:common] if fit else []

    def _batches(self, asked: Sequence[_Asked]) -> Iterator[list[_Asked]]:
        """Prompts in order of length, so that a batch needs little padding."""
        ordered = sorted(asked, key=lambda a: (len(a.tokens), a.index))
        for start in range(0, len(ordered), self.batch_questions):
            yield ordered[start : start + self.batch_questions]

    def _shared(self, params: Params, tokens: list[int]) -> tuple[Segment, ...]:
        arrays = _pad([tokens], padded_length(len(tokens)))
        return (self.prefill(params, *_put(self.mesh, P(), arrays)),) if tokens else ()

    def _arrays(self, batch: Sequence[_Asked], common: int, keys: np.ndarray) -> Prompts:
        """The batch padded to its full number of questions by copies that generate nothing."""
        tokens, mask = _pad(
            [a.tokens for a in batch], padded_length(max(len(a.tokens) for a in batch))
        )
        limits = np.full(keys.shape[:2], self.exam.max_new_tokens, np.int32)
        limits[:, GREEDY] = self.exam.greedy_max_new_tokens
        room = [self.config.max_positions - common - len(a.tokens) for a in batch]
        limits = np.minimum(limits, np.array(room, np.int32)[:, None])
        fill = self.batch_questions - len(batch)
        tokens, mask, keys = (
            np.pad(x, [(0, fill)] + [(0, 0)] * (x.ndim - 1), mode="edge")
            for x in (tokens, mask, keys)
        )
        limits = np.pad(limits, [(0, fill), (0, 0)])
        return Prompts(*_put(self.mesh, BATCH, (tokens, mask, limits, keys)))

    def _completions(self, answers: Answers, row: int) -> tuple[Completion, ...]:
        parts = zip(*(part[row] for part in answers), strict=True)
        return tuple(self._completion(t[:count].tolist(), bool(end)) for t, count, end in parts)

    def _completion(self, tokens: list[int], stopped: bool) -> Completion:
        """Tokens as generated to text, without the end token and what follows a blank line."""
        ended = bool(tokens) and tokens[-1] == self.tokenizer.end_id
        text = self.tokenizer.decode(tokens[:-1] if ended else tokens)
        text, blank, _ = text.partition(BLANK_LINE)
        return Completion(text, "stop" if stopped or blank else "length", len(tokens))


def make_generate(
    config: ModelConfig,
    tokenizer: Tokenizer,
    mesh: Mesh,
    *,
    exam: ExamConfig,
    compute_dtype: DTypeLike,
) -> Generate:
    """Binds all that stays the same from exam to exam; compiles nothing yet.

    Each replica of the weights answers its own questions without a word to the others.

    Args:
      config: What the student looks like.
      tokenizer: Its tokenizer.
      mesh: Devices; questions are spread over the axes `data` and `fsdp`.
      exam: Sampling, limits and batch size.
      compute_dtype: Of products and caches. Logits and what is drawn from them are float32.
    """
    replicas = math.prod(mesh.shape[axis] for axis in REPLICAS)
    axes, shapes = logical_axes(config), abstract_params(config)
    layout = shardings(mesh, axes, shapes, EXAM_RULES)
    end_id = np.array(-1 if tokenizer.end_id is None else tokenizer.end_id, np.int32)

    def lay_out(params: Params) -> Params:
        # Norms work in float32 whatever the states are: their weights are not rounded.
        return jax.tree.map(
            lambda names, weight: weight if "norm" in names else weight.astype(compute_dtype),
            axes,
            params,
            is_leaf=lambda node: isinstance(node, tuple),
        )

    def prefill(params: Params, tokens: jax.Array, mask: jax.Array) -> Segment:
        places = jnp.minimum(jnp.arange(tokens.shape[1]), config.max_positions - 1)[None]
        return forward(config, params, tokens, places, mask, compute_dtype=compute_dtype)[1]

    def spread(
        params: Params,
        shared: tuple[Segment, ...],
        prompts: Prompts,
        stops: Stops,
        *,
        stages: tuple[Stage, ...],
    ) -> Answers:
        sampling = Sampling(exam.temperature, exam.top_k, exam.top_p)
        local = partial(
            answer, config, stages=stages, sampling=sampling, compute_dtype=compute_dtype
        )
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(P(), P(), BATCH, P()),
            out_specs=BATCH,
            axis_names=set(REPLICAS),
            check_vma=False,
        )(params, shared, prompts, stops)

    return Generate(
        config=config,
        tokenizer=tokenizer,
        mesh=mesh,
        exam=exam,
        stops=Stops(*_put(mesh, P(), (end_id, tokenizer.newlines))),
        batch_questions=-(-exam.batch_questions // replicas) * replicas,
        lay_out=jax.jit(lay_out, out_shardings=layout),
        prefill=jax.jit(prefill),
        answer=jax.jit(spread, static_argnames="stages", out_shardings=NamedSharding(mesh, P())),
    )


def _put(mesh: Mesh, spec: P, arrays: Sequence[np.ndarray]) -> list[jax.Array]:
    """Lays host arrays, the same on every host, on the mesh."""
    layout = NamedSharding(mesh, spec)
    return [jax.make_array_from_callback(x.shape, layout, x.__getitem__) for x in arrays]


def _keys(seed: int, round_index: int, question_id: str, rows: int) -> np.ndarray:
    """Key data for each row of a question: a hash of who draws, and of nothing else.

    Example:
      >>> bool((_keys(42, 1, "gsm8k/train/7", 5)[:3] == _keys(42, 1, "gsm8k/train/7", 3)).all())
      True
    """
    names = (f"{seed}\n{round_index}\n{row}\n{question_id}".encode() for row in range(rows))
    digests = b"".join(hashlib.sha256(name).digest()[:8] for name in names)
    return np.frombuffer(digests, "<u4").astype(np.uint32).reshape(rows, 2)


def _pad(rows: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of tokens as an array padded on the right, and True where they stand."""
    tokens = np.zeros((len(rows), length), np.int32)
    mask = np.arange(length)[None] < np.array([len(row) for row in rows])[:, None]
    tokens[mask] = np.concatenate([np.asarray(row, np.int32) for row in rows])
    return tokens, mask
