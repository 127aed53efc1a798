"""Prompts to completions: the tokenizer, the seats and the device programs of an exam together."""

import hashlib
from array import array
from collections.abc import Collection, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.typing import DTypeLike

from distill_jax.config import ExamConfig
from distill_jax.engine import Engine, Weights, exam_mesh
from distill_jax.int_lists import Prompts
from distill_jax.records import GREEDY, Completion
from distill_jax.slots import LEAST, PAGE, Prompt, Row, Seating, Tally
from distill_jax.student.architecture import EncoderDecoderConfig, ModelConfig
from distill_jax.student.model import Params, abstract_params
from distill_jax.student.sampling import Sampling
from distill_jax.tokenizer import Tokenizer, padded_length

BLANK_LINE = "\n\n"

CPU_SLOTS, MOST_SLOTS = 128, 512
"""Slots on a CPU, and of a replica elsewhere: more of them make products no more efficient."""


@dataclass(frozen=True)
class Generate:
    """Completes prompts with the student; made by `make_generate`."""

    config: ModelConfig
    tokenizer: Tokenizer
    exam: ExamConfig
    engine: Engine

    def __call__(
        self,
        params: Params,
        prompts: Iterable[str],
        ids: Sequence[str],
        *,
        samples: int,
        seed: int,
        round_index: int,
        done: Collection[int] = (),
    ) -> Iterator[tuple[int, tuple[Completion, ...]]]:
        """Answers each prompt once greedily and `samples` times at random.

        What a row chooses depends on its prompt and its random numbers alone. On CPUs in float32
        it is the same bit for bit whatever the number of slots and replicas and whatever `done`
        says. Elsewhere, and where other prompts or a longer tensor axis change how sums are
        rounded, a token differs only where two are as good as equal.

        Args:
          params: The student's weights, in any layout on the mesh. Laid out for the exam once.
          prompts: What to complete, gone through once. Their common first tokens are computed once.
          ids: An id for each prompt. What is drawn depends on seed, round, id and sample alone.
          samples: Completions drawn per prompt, from 0.
          seed: Of the run.
          round_index: Of the weights.
          done: Indices of prompts to leave out. They are not computed.

        Yields:
          The index of a prompt, and its completions: the greedy one, then the samples. In no
          particular order, each prompt once. A text ends before its first blank line and before
          the end token. A prompt that is longer than the student's context gets empty completions
          that count as cut.

        Raises:
          ValueError: there are not as many ids as prompts; raised with the first result.
        """
        asked = self.ask(prompts, ids, samples, (seed, round_index))
        owed = set(range(len(ids))) - set(done)
        for index in sorted(owed.difference(asked.fit)):
            yield index, (Completion("", "length", 0),) * (1 + samples)
        owed.intersection_update(asked.fit)
        if not owed:
            return
        weights = self.engine.lay_out(params)
        slots = plan_slots(
            self.engine,
            asked,
            asked=self.exam.slots,
            num_owed=len(owed) * (1 + samples),
            free=free_memory(self.engine.mesh),
        )
        for prompt in sit(self.engine, weights, asked.common, asked, owed=owed, slots=slots):
            yield prompt.index, tuple(map(self._completion, prompt.rows))

    def ask(
        self, prompts: Iterable[str], ids: Sequence[str], samples: int, seeds: tuple[int, int]
    ) -> "Asked":
        """The prompts that leave room for an answer, ready to be seated."""
        encoded, fit, count = Prompts(), array("i"), 0
        # States of an encoder depend on the whole prompt: nothing of it is common.
        start = [self.config.start_id] if isinstance(self.config, EncoderDecoderConfig) else None
        for count, tokens in enumerate(self.tokenizer.encode_prompts(prompts), start=1):
            if len(tokens) <= self.config.max_positions:
                fit.append(count - 1)
                encoded.append([*tokens, *(start or ())])
        if len(ids) != count:
            raise ValueError(f"each prompt needs an id; got {count} and {len(ids)} ids.")
        num_common = 0 if start else encoded.num_common
        return Asked(self, encoded, fit, ids, samples, seeds, num_common)

    def _completion(self, row: Row) -> Completion:
        return read_completion(self.tokenizer, row.chosen, stopped=row.stopped)


@dataclass(frozen=True)
class Asked(Sequence[Prompt]):
    """The prompts of an exam, each made when it is asked for: there may be millions."""

    generate: Generate
    encoded: Prompts
    fit: Sequence[int]  # which of those given
    ids: Sequence[str]  # of those given
    samples: int
    seeds: tuple[int, int]  # of the run, and the round of the weights
    num_common: int

    @property
    def common(self) -> list[int]:
        """The tokens that all begin with."""
        return self.encoded.first[: self.num_common]

    def __len__(self) -> int:
        return len(self.fit)

    def __getitem__(self, number: int) -> Prompt:
        index = self.fit[number]
        prompt = Prompt(index, self.encoded.behind(number, self.num_common))
        # The last token that is chosen is never read, and needs no position.
        room = self.generate.config.max_positions + 1 - self.encoded.length(number)
        for place, key in enumerate(row_keys(*self.seeds, self.ids[index], 1 + self.samples)):
            limit = self.generate.exam.max_new_tokens[0 if place == GREEDY else 1]
            prompt.rows.append(Row(prompt, place, min(limit, room), key))
        return prompt


def read_completion(tokenizer: Tokenizer, tokens: list[int], *, stopped: bool) -> Completion:
    """Tokens as generated to text, without the end token and what follows a blank line."""
    ended = bool(tokens) and tokens[-1] == tokenizer.end_id
    text = tokenizer.decode(tokens[:-1] if ended else tokens)
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

    Args:
      config: What the student looks like.
      tokenizer: Its tokenizer.
      mesh: Devices. The exam divides them anew: as many copies of the weights as memory allows,
        each with its own rows.
      exam: Sampling, limits and slots.
      compute_dtype: Of products, weights and pages. Norms, logits and what is drawn from them are
        float32.
    """
    end_id = -1 if tokenizer.end_id is None else tokenizer.end_id
    sizes = (leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    num_bytes = sum(sizes) * np.dtype(compute_dtype).itemsize
    limit = min((total for total, _ in _memory(mesh)), default=None)
    engine = Engine(
        config,
        exam_mesh(mesh, num_bytes, limit),
        end_id=end_id,
        newlines=tokenizer.newlines,
        sampling=Sampling(exam.temperature, exam.top_k, exam.top_p),
        compute_dtype=compute_dtype,
    )
    return Generate(config, tokenizer, exam, engine)


def sit(
    engine: Engine,
    weights: Weights,
    common: Sequence[int],
    prompts: Sequence[Prompt],
    *,
    owed: Collection[int],
    slots: int,
) -> Generator[Prompt, None, Tally]:
    """Has prompts answered.

    Args:
      engine: The device programs.
      weights: From `engine.lay_out`.
      common: What all prompts begin with; may be empty.
      prompts: All prompts of the exam, each with the same rows in order of place.
      owed: Indices of those to be answered; at least one is.
      slots: Rows that choose at the same time on each replica, a multiple of `LEAST`.

    Yields:
      Each prompt owed, once its rows have chosen their last tokens.

    Returns:
      What was computed.
    """
    share = 1 + prompts[0].rows[-1].place
    shared = engine.read_shared(weights, common)
    seating = Seating(prompts, owed=owed, desks=engine.desks, slots=slots)
    pools = engine.make_pools(seating.sizes)
    while not seating.ended:
        while (next_to_read := seating.read()) is not None:
            move, reading = next_to_read
            pools = engine.read_prompts(weights, shared, engine.move(pools, move), reading)
        move, rows, enough = seating.seat()
        pools = engine.move(pools, move)
        pools, chosen = engine.advance(weights, shared, pools, rows, enough, share=share)
        yield from seating.take(chosen)
    return seating.tally


def plan_slots(
    engine: Engine, prompts: Sequence[Prompt], *, asked: int, num_owed: int, free: int | None
) -> int:
    """How many slots each replica gets.

    Args:
      engine: The device programs.
      prompts: All prompts of the exam.
      asked: Slots over all replicas, or 0 for as many as are worth while and fit.
      num_owed: Rows to be answered.
      free: From `free_memory`, once the weights are laid out.
    """
    if asked:
        slots = -(-asked // engine.desks)
    elif free is None:
        slots = CPU_SLOTS // engine.desks
    else:
        # What is free varies a little from exam to exam, and programs must not.
        fit = min(MOST_SLOTS, free // slot_bytes(engine, prompts))
        slots = next((size for size in range(fit, 0, -1) if padded_length(size) == size), 1)
    slots = min(slots, -(-num_owed // engine.desks))
    return max(1, -(-slots // LEAST)) * LEAST


def slot_bytes(engine: Engine, prompts: Sequence[Prompt]) -> int:
    """What a slot needs on each device at most: pages of its row, its part of prompts, logits."""
    return row_bytes(engine.config, prompts, dtype=engine.dtype, shards=engine.page_shards)


def row_bytes(
    config: ModelConfig, prompts: Sequence[Prompt], *, dtype: np.dtype, shards: int
) -> int:
    """The same without programs, for pages that lie on so many devices."""
    own = max(row.limit for prompt in prompts for row in prompt.rows) + 2 * PAGE
    prompt = (max(len(prompt.tokens) for prompt in prompts) + PAGE) * 3 // len(prompts[0].rows)
    token = -(-2 * config.layers * config.kv_heads * config.head_dim * dtype.itemsize // shards)
    return (own + prompt) * token + 4 * 4 * config.padded_vocab


def free_memory(mesh: Mesh) -> int | None:
    """Bytes that every device has left, with some to spare; None where nobody knows."""
    free = [total - used for total, used in _memory(mesh)]
    if not free:
        return None
    # All hosts must take the same number, or their programs differ.
    return int(multihost_utils.process_allgather(np.array(min(free))).min()) * 9 // 10


def _memory(mesh: Mesh) -> list[tuple[int, int]]:
    """Bytes of each of this host's devices, in all and in use; empty where nobody knows."""
    stats = filter(None, (device.memory_stats() for device in mesh.local_devices))
    return [(known["bytes_limit"], known["bytes_in_use"]) for known in stats]


def row_keys(seed: int, round_index: int, question_id: str, rows: int) -> np.ndarray:
    """Key data for each row of a question: a hash of who draws, and of nothing else.

    Example:
      >>> few, many = (row_keys(42, 1, "gsm8k/train/7", rows) for rows in (3, 5))
      >>> bool((many[:3] == few).all())
      True
    """
    names = (f"{seed}\n{round_index}\n{row}\n{question_id}".encode() for row in range(rows))
    digests = b"".join(hashlib.sha256(name).digest()[:8] for name in names)
    return np.frombuffer(digests, "<u4").astype(np.uint32).reshape(rows, 2)
