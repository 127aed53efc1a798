"""What a teacher might have said, from its reply to the student's loss."""

import json
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from samples import SIX, make_batch, make_samples
from test_batches import END, LETTERS

from distill_jax import plain_packing
from distill_jax.config import TutorConfig
from distill_jax.packing import Item
from distill_jax.prompts import feedback_prompt
from distill_jax.questions.arithmetic import make_questions
from distill_jax.records import Piece, Rationale, from_json, to_json
from distill_jax.scratch import make_tokenizer
from distill_jax.soft_targets import ALTERNATIVES, find_others
from distill_jax.student.losses import SoftTargets, prediction_costs, prediction_loss
from distill_jax.student.objective import Objective
from distill_jax.student.tree import NOWHERE
from distill_jax.teacher.reply import read_pieces, read_reply
from distill_jax.teacher.tutor import ChatRequest, Tutor, _completion
from distill_jax.tokenizer import Tokenizer

WORDS = Tokenizer(make_tokenizer())


def score(head: jax.Array, hidden: jax.Array) -> jax.Array:
    return hidden @ head


def soft_case(seed: int = 3, others: int = 3):
    """States, head, weights and targets, a third of them hard, and the dense distribution."""
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(2, 13, 6)), rng.normal(size=(6, 19))
    weights, shares = rng.random((2, 13)), rng.random((2, 13, others + 1))
    shares /= shares.sum(-1, keepdims=True)
    shares[:, ::3] = np.eye(others + 1)[0]
    ids = np.stack([rng.permutation(19)[: others + 1] for _ in range(26)]).reshape(2, 13, -1)
    dense = np.zeros((2, 13, 19))
    np.put_along_axis(dense, ids, shares, axis=-1)
    targets = SoftTargets(
        jnp.asarray(ids[..., 0], jnp.int32),
        jnp.asarray(ids[..., 1:], jnp.int32),
        jnp.asarray(shares[..., 1:], jnp.float32),
    )
    return (*(jnp.asarray(x, jnp.float32) for x in (hidden, head, weights)), targets, dense)


@pytest.mark.parametrize("chunk", [4, 64])
def test_the_soft_loss_and_its_gradients_equal_pytorchs(chunk: int):
    torch = pytest.importorskip("torch", reason="the reference")
    hidden, head, weights, targets, dense = soft_case()
    theirs = [torch.tensor(np.asarray(x, np.float64), requires_grad=True) for x in (hidden, head)]
    scores = (theirs[0] @ theirs[1]).flatten(0, 1)
    costs = torch.nn.functional.cross_entropy(
        scores, torch.tensor(dense).flatten(0, 1), reduction="none"
    )
    wanted = 3.0 * (torch.tensor(np.asarray(weights, np.float64)).flatten() * costs).sum()
    wanted.backward()

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return 3.0 * prediction_loss(hidden, targets, head, score, weights, chunk=chunk)

    found, gradients = jax.value_and_grad(loss, argnums=(0, 1))(hidden, head)
    np.testing.assert_allclose(found, wanted.item(), rtol=1e-5)
    np.testing.assert_allclose(loss(hidden, head), wanted.item(), rtol=1e-5)
    each = prediction_costs(hidden, targets, head, score, chunk=chunk)
    np.testing.assert_allclose(each.ravel(), costs.detach().numpy(), rtol=1e-5, atol=1e-6)
    for ours, other in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(ours, other.grad.numpy(), rtol=1e-5, atol=3e-6)


def test_hard_targets_are_bit_equal_whether_or_not_others_could_stand_beside_them():
    hidden, head, weights, targets, _ = soft_case()
    none = targets._replace(shares=jnp.zeros_like(targets.shares))

    def loss(hidden: jax.Array, targets) -> jax.Array:
        return prediction_loss(hidden, targets, head, score, weights, chunk=4)

    soft = jax.value_and_grad(loss)(hidden, none)
    hard = jax.value_and_grad(loss)(hidden, targets.tokens)
    assert all(map(np.array_equal, soft, hard))
    assert float(soft[0]) != float(loss(hidden, targets))


def test_no_array_of_all_tokens_by_vocabulary_lives():
    targets = SoftTargets(
        jnp.zeros((1, 64), jnp.int32), jnp.ones((1, 64, 3), jnp.int32), jnp.ones((1, 64, 3)) / 4
    )

    def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return prediction_loss(hidden, targets, head, score, jnp.ones((1, 64)), chunk=8)

    gradient = jax.grad(loss, argnums=(0, 1))
    text = str(jax.make_jaxpr(gradient)(jnp.ones((1, 64, 4)), jnp.ones((4, 50))))
    assert "8,50]" in text
    assert "64,50]" not in text and "8,8,50]" not in text and "8,1,8,50]" not in text


def with_others(samples: list[Item], seed: int) -> list[Item]:
    """The samples with others for every second token of every second anchor."""
    rng = np.random.default_rng(seed)
    return [
        item._replace(
            others=tuple(
                tuple((int(rng.integers(3, 99)), float(rng.random())) for _ in range(1 + at % 2))
                if at % 2
                else ()
                for at in range(len(item.anchor))
            )
        )
        if index % 2
        else item
        for index, item in enumerate(samples)
    ]


def read_others(batch, owner: int) -> list[tuple]:
    """The target of each place of an anchor with its others, in the order of the line."""
    places = np.flatnonzero(batch.owners[0, 0] == owner)
    return [
        (
            int(batch.targets[0, 0, place]),
            [
                (int(id), round(float(share), 6))
                for id, share in zip(*(x[0, 0, place] for x in batch[-2:]), strict=True)
                if share
            ],
        )
        for place in places
    ]


@pytest.mark.parametrize("reflection", ["none", "triplet", "dpo"])
@pytest.mark.parametrize("plain", [False, True])
def test_others_stand_where_their_targets_stand(reflection, plain: bool):
    objective = Objective(reflection=reflection, alternatives=3)
    samples = with_others(make_samples(4, 99, 3), 5)
    if plain:
        shapes = plain_packing.plan_shapes([samples], SIX, objective)
        batch = plain_packing.pack(samples, SIX, shapes, shared=(), objective=objective)
    else:
        batch = make_batch(samples, 3, objective)
    assert batch.others is not None and batch.others.shape[-1] == 3
    found = [read_others(batch, 2 * row) for row in range(6)]
    expected = [
        [
            (token, [(id, round(share, 6)) for id, share in others])
            for token, others in zip(item.anchor, item.others or [()] * 99, strict=False)
        ]
        for item in samples
    ]
    assert sorted(found) == sorted(expected)
    shares = np.asarray(batch.shares)
    assert np.count_nonzero(shares) == sum(len(each) for item in samples for each in item.others)
    hard = make_batch(samples, 3, Objective(reflection=reflection))
    assert hard.others is None and hard.shares is None
    negatives = np.flatnonzero(batch.owners[0, 0] % 2 * (batch.owners[0, 0] < NOWHERE))
    assert not shares[0, 0, negatives].any()


def piece(text: str, own: float = 1.0, **others: float) -> Piece:
    return text, ((text, own), *((name.replace("_", " "), p) for name, p in others.items()))


def spell(target: str) -> list[int]:
    return [*map(ord, target), END]


def test_a_token_that_covers_the_same_characters_is_soft():
    target = " ab\nAnswer: 4"
    pieces = [piece(" ", 0.5, x=0.3, yy=0.2), piece("a", 0.6, b=0.2, c=0.2), piece("b", 1.0)]
    others = find_others(LETTERS, target, spell(target), rationale="ab", pieces=pieces)
    assert others[0] == ((ord("x"), 0.3 / 0.8),)  # two letters are no token
    assert dict(others[1]) == pytest.approx({ord("b"): 0.2, ord("c"): 0.2})
    assert not any(others[2:])
    assert find_others(LETTERS, target, spell(target), rationale="ab", pieces=()) == ()
    unlike = [piece("a", 0.5, b=0.5), piece("c", 0.5, b=0.5)]
    assert find_others(LETTERS, target, spell(target), rationale="ab", pieces=unlike) == ()


def test_white_space_that_was_changed_labels_and_answers_stay_hard():
    target = " a b c\nAnswer: 4"
    said = ["Reasoning:", " ", "a", "  ", "b", "\n", "c", "\n", "Answer", ":", " ", "4"]
    pieces = [piece(text, 0.5, q=0.5) for text in said]
    others = find_others(LETTERS, target, spell(target), rationale="a b c", pieces=pieces)
    soft = [bool(each) for each in others]
    assert soft == [True, True, False, True, False, True, *[False] * (len(target) - 5)]


def test_only_the_likeliest_are_kept():
    target = " a\nAnswer: 4"
    chances = [("a", 0.1), *((letter, 0.05 * at) for at, letter in enumerate("bcdefgh", 1))]
    others = find_others(
        LETTERS, target, spell(target), rationale="a", pieces=[("a", tuple(chances))]
    )
    assert [chr(id) for id, _ in others[1]] == list("hgfed") and len(others[1]) == ALTERNATIVES
    total = 0.1 + sum(0.05 * at for at in (3, 4, 5, 6, 7))
    np.testing.assert_allclose([p for _, p in others[1]], np.arange(7, 2, -1) * 0.05 / total)


def entry(text: str | bytes, p: float, *others: dict, raw: bool = True) -> dict:
    data = text if isinstance(text, bytes) else text.encode()
    shown = {"token": data.decode(errors="replace"), "logprob": math.log(p)}
    shown |= {"bytes": list(data)} if raw else {}
    return shown | ({"top_logprobs": list(others)} if others else {})


def test_pieces_are_read_as_bytes_and_parts_of_characters_are_joined():
    euro = "€".encode()
    content = [
        entry("1", 0.5, entry("1", 0.5), entry("2", 0.25, raw=False)),
        entry(euro[:1], 0.9),
        entry(euro[1:], 0.9, entry(b"\xff", 0.1)),
        entry("!", 1.0),
    ]
    assert read_pieces({"logprobs": {"content": content}}) == (
        ("1", (("1", 0.5), ("2", 0.25))),
        ("€", ()),
        ("!", (("!", 1.0),)),
    )


@pytest.mark.parametrize(
    "logprobs",
    [
        None, [], "x", {}, {"content": None}, {"content": "ab"}, {"content": [None]},
        {"content": [{}]}, {"content": [{"token": "a"}]}, {"content": [{"token": 3, "logprob": 0}]},
        {"content": [{"token": "a", "logprob": "0"}]},
        {"content": [{"token": "a", "logprob": -1, "bytes": 10**15}]},
        {"content": [{"token": "a", "logprob": -1, "bytes": [999]}]},
        {"content": [{"token": "a", "logprob": -1, "top_logprobs": [3]}]},
        {"content": [{"token": "\ud800", "logprob": -1}]},
    ],
)  # fmt: skip
def test_a_text_whose_likelihoods_cannot_be_read_is_a_text(logprobs):
    choice = {"message": {"content": "ab"}, "finish_reason": "stop", "logprobs": logprobs}
    (completion,) = read_reply(json.dumps({"choices": [choice]}), max_tokens=9).completions
    assert completion is not None and (completion.text, completion.pieces) == ("ab", ())


def test_what_is_no_probability_is_none():
    tokens = '[{"token": "a", "logprob": NaN}, {"token": "b", "logprob": 7}, '
    tokens += '{"token": "c", "logprob": -9999.0}]'
    pieces = read_pieces({"logprobs": {"content": json.loads(tokens)}})
    assert [chances[0][1] for _, chances in pieces] == [0.0, 1.0, 0.0]


def test_rows_of_lessons_keep_their_pieces_and_old_ones_are_read():
    row = Rationale("q", 1, 0, "ab", "4", "kept", (piece("a", 0.5, b=0.25), ("€", ())))
    again = json.loads(json.dumps(to_json(row)))
    assert from_json(Rationale, again) == row and hash(from_json(Rationale, again))
    del again["pieces"]
    assert from_json(Rationale, again).pieces == ()
    with pytest.raises(ValueError, match="a Rationale row has"):
        from_json(Rationale, again | {"piece": 1})


def how_often(told: Counter[str], text: str) -> int:
    """Texts that begin with this one, and not with a longer word."""
    begins = re.compile(rf"{re.escape(text)}(?!(?<=\w)\w)")
    return sum(number for said, number in told.items() if begins.match(said))


def test_the_tutors_probabilities_are_how_often_it_says_so():
    questions = make_questions(num_train=2, num_test=0, steps=[2], max_value=20, seed=3)
    rates, question = TutorConfig(wrong_rates=(0.3, 0.1)), questions[0]
    prompt = feedback_prompt(question, mistake=None, hint=True, demonstrations="")
    told: Counter[str] = Counter()
    for seed in range(400):
        told.update(Tutor(questions, tutor=rates, seed=seed).answer(prompt, samples=16) or [])
    body = {"model": "tutor", "messages": [{"role": "user", "content": prompt}], "n": 16}
    wanted = ChatRequest.model_validate(body | {"logprobs": True, "top_logprobs": 20})
    tutor = Tutor(questions, tutor=rates, seed=0)
    texts = tutor.answer(prompt, samples=16)
    assert texts is not None
    reply = _completion(wanted, texts, tutor.tellings(prompt))
    number = told.total()
    for choice in reply["choices"]:
        tokens, text = choice["logprobs"]["content"], ""
        for token in tokens:
            before = how_often(told, text)
            shares = {each["token"]: math.exp(each["logprob"]) for each in token["top_logprobs"]}
            assert shares[token["token"]] == pytest.approx(math.exp(token["logprob"]))
            assert len(shares) == 20 or sum(shares.values()) == pytest.approx(1.0)
            for word, share in shares.items():
                seen = how_often(told, text + word)
                assert abs(seen - before * share) <= 5 * (before * share * (1 - share)) ** 0.5 + 1
            text += token["token"]
        assert text == choice["message"]["content"]
        likely = math.exp(sum(token["logprob"] for token in tokens))
        assert abs(told[text] - number * likely) <= 5 * (number * likely) ** 0.5 + 1


def test_the_students_words_learn_the_tutors_slips():
    (question, *_) = make_questions(num_train=2, num_test=0, steps=[1], max_value=20, seed=3)
    tutor = Tutor([question], tutor=TutorConfig(wrong_rates=(0.2, 0.1)), seed=0)
    prompt = feedback_prompt(question, mistake=None, hint=True, demonstrations="")
    body = {"model": "tutor", "messages": [{"role": "user", "content": prompt}]}
    wanted = ChatRequest.model_validate(body | {"logprobs": True, "top_logprobs": ALTERNATIVES})
    text = f"{question.solution}\nAnswer: {question.answer}"
    reply = _completion(wanted, [text], tutor.tellings(prompt))
    (completion,) = read_reply(json.dumps(reply), max_tokens=99).completions
    assert completion is not None
    target = f" {question.solution}\nAnswer: {question.answer}"
    ids = WORDS.encode_target("Question: How many?\nReasoning:", target)
    said = {"rationale": question.solution, "pieces": completion.pieces}
    others = find_others(WORDS, target, ids, **said)
    soft = {WORDS.decode([id]): each for id, each in zip(ids, others, strict=True) if each}
    result = f" {question.answer}"
    assert result in soft
    slips = {int(WORDS.decode([id])) - int(question.answer) for id, _ in soft[result]}
    assert slips and slips <= {1, -1, 2, -2, 10, -10}
    assert sum(share for _, share in soft[result]) < 0.21
