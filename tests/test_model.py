"""The decoder against transformers, and against itself cut into segments."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_models import (
    GPT2,
    LLAMA,
    PUBLISHED,
    make_params,
    make_published,
    make_rows,
    published_logits,
    run,
    variant,
    whole,
)

from distill_jax.student.attention import Segment
from distill_jax.student.model import (
    ModelConfig,
    abstract_params,
    forward,
    head,
    init_params,
    logical_axes,
    logits,
    narrow,
)
from distill_jax.student.sharding import BATCH, TRAIN_RULES, make_mesh
from distill_jax.weights import load_params, read_model_config

TOLERANCE = 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_equals_transformers(name, tmp_path):
    published = make_published(tmp_path, name)
    config = read_model_config(tmp_path)
    assert config == variant(name)
    params = load_params(tmp_path, config, whole(config))
    for left in (True, False):
        rows = make_rows([9, 5, 12, 1], vocab_size=config.vocab_size, left=left)
        scores, states = published_logits(published, *rows)
        hidden, _ = run(config, params, *rows)
        real = rows[2]
        ours = logits(config, params, hidden)[..., : config.vocab_size]
        apart = np.abs(np.asarray(hidden) - states)[real].max()
        scores_apart = np.abs(np.asarray(ours) - scores)[real].max()
        print(f"{name}: states {apart:.1e}, logits {scores_apart:.1e} from transformers")
        assert apart < TOLERANCE
        assert scores_apart < TOLERANCE
        assert np.isfinite(hidden).all()


HALF = ["gpt2", "gptj", "opt-350m", "gpt-neo", "gpt-neox", "llama-3", "qwen3", "gemma2", "gemma3"]


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_is_as_near_as_that_of_transformers(name, tmp_path):
    """To float32 with the same rounded weights, by root mean square; a rounding is up to 0.4%."""
    torch = pytest.importorskip("torch")
    published = make_published(tmp_path, name).to(torch.bfloat16)
    published.save_pretrained(tmp_path)
    config = read_model_config(tmp_path)
    params = load_params(tmp_path, config, whole(config))
    rows = make_rows([9, 5, 12, 1], vocab_size=config.vocab_size)
    theirs = published_logits(published, *rows)
    exact, rough = (
        [logits(config, params, hidden)[..., : config.vocab_size], hidden]
        for dtype in (jnp.float32, jnp.bfloat16)
        for hidden, _ in [run(config, params, *rows, compute_dtype=dtype)]
    )
    for what, true, ours, other in zip(("logits", "states"), exact, rough, theirs, strict=True):
        far, their_far, apart = (
            _distance(one, two, true, rows[2])
            for one, two in ((ours, true), (other, true), (ours, other))
        )
        print(f"{name}: {what} in bfloat16 {far:.2%} off, transformers {their_far:.2%}")
        assert far < 1.3 * their_far
        assert apart < 0.02


def _distance(one, other, scale, mask) -> float:
    """Root mean square of a difference, as a share of that of `scale`."""
    one, other, scale = (np.asarray(x, np.float32)[mask] for x in (one, other, scale))
    return float(np.linalg.norm(one - other) / np.linalg.norm(scale))


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma3"])
def test_half_precision_keeps_norms_softmax_and_angles_in_float32(name):
    config = variant(name)
    shapes = abstract_params(config)
    rows = make_rows([7, 4], vocab_size=config.vocab_size)
    traced = jax.make_jaxpr(partial(forward, config, compute_dtype=jnp.bfloat16))(shapes, *rows)
    found = {"dot_general": set(), "rsqrt": set(), "exp": set(), "cos": set(), "sin": set()}
    for equation in equations(traced.jaxpr):
        kind = equation.primitive.name
        if kind == "dot_general" and not equation.params["dimension_numbers"][0][0]:
            continue  # a factor for each row, as in norms: nothing is summed
        if kind in found:
            found[kind] |= {x.aval.dtype.name for x in equation.invars}
    assert found.pop("dot_general") == {"bfloat16"}
    turned = config.positions == "rotary"
    assert found.pop("cos") == found.pop("sin") == ({"float32"} if turned else set())
    assert found == {"rsqrt": {"float32"}, "exp": {"float32"}}


def equations(jaxpr):
    """All of a program's operations, also those inside loops and calls."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def assert_same_gradients(ours, plain):
    """Apart by rounding only; the gradient of a weight without effect is nothing but rounding."""
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(plain))
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=TOLERANCE, atol=1e-5 * largest)


def branches_flat(config, params, tokens, cuts):
    """One flat row per branch, with nothing shared: the states of the branch's own tokens."""
    shared, questions, branches = cuts
    rows, each = tokens.shape[0], tokens.shape[0] // questions.shape[0]
    texts = [
        np.concatenate([shared[0], questions[b // each], branches[b]]).astype(int)
        for b in range(rows)
    ]
    full = np.stack(texts)
    positions = np.broadcast_to(np.arange(full.shape[1])[None], full.shape)
    hidden, _ = run(config, params, full, positions, np.ones(full.shape, bool))
    return hidden[:, -branches.shape[1] :]


def branches_tree(config, params, tokens, cuts):
    """The same as a tree: shared tokens once, questions once, branches last."""
    past, start = [], 0
    for stretch in cuts:
        positions = np.broadcast_to(start + np.arange(stretch.shape[1])[None], stretch.shape)
        hidden, segment = run(
            config, params, stretch, positions, np.ones(stretch.shape, bool), tuple(past)
        )
        past.append(segment)
        start += stretch.shape[1]
    return hidden


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("llama", (7, 5, 6)),
        ("llama", (1, 9, 1)),
        ("gpt2", (4, 1, 8)),
        ("gemma3", (7, 5, 6)),
    ],
)
def test_tree_of_segments_equals_flat_rows_with_gradients(name, lengths):
    config, rng = variant(name), np.random.default_rng(sum(lengths))
    params = make_params(config)
    cuts = [
        rng.integers(0, config.vocab_size, (groups, length))
        for groups, length in zip((1, 2, 6), lengths, strict=True)
    ]
    pull = rng.normal(size=(6, lengths[2], config.width))

    def loss(params, branches):
        hidden = branches(config, params, cuts[2], cuts)
        return jnp.sum(hidden * pull), hidden

    flat, tree = (
        jax.jit(jax.value_and_grad(partial(loss, branches=branches), has_aux=True))(params)
        for branches in (branches_flat, branches_tree)
    )
    np.testing.assert_allclose(tree[0][1], flat[0][1], atol=TOLERANCE)
    assert_same_gradients(tree[1], flat[1])


@pytest.mark.parametrize("name", PUBLISHED)
def test_token_by_token_equals_the_whole(name):
    config = variant(name)
    params, rows = make_params(config), make_rows([9, 5, 12, 1], vocab_size=config.vocab_size)
    expected, whole = run(config, params, *rows)
    empty = jnp.zeros_like(whole.keys)
    past = Segment(empty, empty, jnp.asarray(rows[1]), jnp.zeros((4, 12), bool))
    for t in range(12):
        tokens, positions, mask = (x[:, t : t + 1] for x in rows)
        hidden, own = run(config, params, tokens, positions, mask, (past,))
        real = mask[:, 0]
        np.testing.assert_allclose(hidden[real, 0], expected[real, t], atol=TOLERANCE)
        past = past._replace(
            keys=jnp.asarray(past.keys).at[:, :, :, t].set(own.keys[:, :, :, 0]),
            values=jnp.asarray(past.values).at[:, :, :, t].set(own.values[:, :, :, 0]),
            mask=jnp.asarray(past.mask).at[:, t].set(real),
        )
    seen = np.asarray(rows[2])
    for name in ("keys", "values"):
        ours, plain = (np.moveaxis(getattr(x, name), 3, 2)[:, seen] for x in (past, whole))
        np.testing.assert_allclose(ours, plain, atol=TOLERANCE)


def test_masked_tokens_change_nothing_and_give_no_nan():
    params = make_params(LLAMA)
    tokens, positions, mask = make_rows([4, 6], vocab_size=301)
    prefix = make_rows([3, 5], vocab_size=301, left=True, seed=1)
    own = np.arange(6)[None] + prefix[2].sum(axis=1)[:, None]

    def states(prefix_tokens, tokens):
        _, segment = run(LLAMA, params, prefix_tokens, *prefix[1:])
        return run(LLAMA, params, tokens, own, mask, (segment,))[0]

    first = states(prefix[0], tokens)
    again = states(np.where(prefix[2], prefix[0], 7), np.where(mask, tokens, 9))
    np.testing.assert_array_equal(first[mask], again[mask])

    def loss(params):
        nothing = np.zeros((2, 6), bool)
        return run(LLAMA, params, tokens, positions, nothing)[0].sum()

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_a_single_visible_token_has_the_right_gradient():
    """A softmax over one token is flat in its score; a tie in a maximum once halved such terms."""
    params = make_params(LLAMA)
    row = (np.array([[5]]), np.array([[0]]), np.array([[True]]))
    gradient = jax.jit(jax.grad(lambda p: run(LLAMA, p, *row)[0][0, 0, 3]))(params)
    attention = gradient["blocks"]["attention"]
    assert np.abs(attention["value"]).max() > 1e-3
    assert np.abs(attention["query"]).max() < 1e-6
    assert np.abs(attention["key"]).max() < 1e-6


def test_half_precision_keeps_norms_and_scores_in_float32():
    params, rows = make_params(GPT2), make_rows([7, 4], vocab_size=131)
    exact, _ = run(GPT2, params, *rows)
    rough, segment = run(GPT2, params, *rows, compute_dtype=jnp.bfloat16)
    assert rough.dtype == segment.keys.dtype == jnp.bfloat16
    assert logits(GPT2, params, rough).dtype == jnp.float32
    apart = np.abs(np.asarray(exact) - np.asarray(rough, np.float32))[rows[2]]
    assert 0 < apart.max() < 0.2 * np.abs(exact).max()


@pytest.mark.parametrize("name", ["gptj", "opt-350m", "qwen3", "gemma3"])
def test_narrow_weights_score_the_same_bits(name):
    config = variant(name)
    params, rows = make_params(config), make_rows([7, 4], vocab_size=config.vocab_size)

    @jax.jit
    def score(params, rows):
        hidden, _ = forward(config, params, *rows, compute_dtype=jnp.bfloat16)
        return logits(config, params, hidden)

    fewer = narrow(params, jnp.bfloat16)
    np.testing.assert_array_equal(score(fewer, rows), score(params, rows))
    whole_bytes, bytes_left = (sum(x.nbytes for x in jax.tree.leaves(t)) for t in (params, fewer))
    assert bytes_left < 0.51 * whole_bytes


def test_eight_devices_equal_one():
    config = dataclasses.replace(LLAMA, width=64, mlp_width=72)
    mesh = make_mesh(2, 2, 2)
    one = init_params(config, jax.random.key(4), whole(config))
    many = init_params(config, jax.random.key(4), whole(config, mesh, TRAIN_RULES))
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)
    rows = make_rows([9, 5, 12, 1], vocab_size=config.vocab_size)
    spread = jax.sharding.NamedSharding(mesh, BATCH)

    def scores(params, tokens, positions, mask):
        hidden, _ = run(
            config,
            params,
            tokens,
            positions,
            mask,
            constrain=lambda x: jax.lax.with_sharding_constraint(x, spread),
        )
        return logits(config, params, hidden)

    expected = logits(config, one, run(config, one, *rows)[0])
    ours = jax.jit(scores)(many, *(jax.device_put(x, spread) for x in rows))
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE)


def test_the_padded_vocabulary_has_no_probability():
    assert GPT2.padded_vocab == 256
    params, rows = make_params(GPT2), make_rows([7, 4], vocab_size=131)
    hidden, _ = run(GPT2, params, *rows)
    scores = logits(GPT2, params, hidden)
    assert scores.shape == (2, 7, 256)
    assert (np.asarray(scores)[..., 131:] == -np.inf).all()
    assert np.isfinite(np.asarray(scores)[..., :131]).all()
    weight, bias = head(GPT2, params)
    assert bias is not None
    np.testing.assert_allclose(hidden @ weight + bias[None, None], scores, atol=TOLERANCE)
    drawn = jax.random.categorical(jax.random.key(0), scores, shape=(500, 2, 7))
    assert int(drawn.max()) < 131
    gradient = jax.grad(lambda p: jax.nn.log_softmax(logits(GPT2, p, hidden))[..., 3].sum())(params)
    assert np.isfinite(gradient["embedding"]).all()
    assert not np.asarray(gradient["embedding"][131:]).any()


def test_a_vocabulary_that_needs_no_padding_has_no_bias():
    config = dataclasses.replace(LLAMA, vocab_size=256)
    assert config.padded_vocab == 256
    assert head(config, make_params(config))[1] is None


def test_axes_name_every_dim():
    for config in map(variant, PUBLISHED):
        shapes, axes = abstract_params(config), logical_axes(config)
        jax.tree.map(
            lambda names, leaf: (
                pytest.fail(f"{names} {leaf.shape}") if len(names) != len(leaf.shape) else None
            ),
            axes,
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        assert axes["blocks"]["mlp"]["up"] == ("layers", "embed", "mlp")
        assert shapes["blocks"]["mlp"]["up"].shape == (
            config.layers,
            config.width,
            config.mlp_width,
        )


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("kv_heads", 4, "kv_heads must divide heads=6; got 4"),
        ("head_dim", 7, "even head_dim; got 7"),
        ("activation", "tanh", "activation is one of silu, gelu_new, .*; got 'tanh'"),
    ],
)
def test_impossible_configs_are_refused(field, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        ModelConfig(**{**dataclasses.asdict(LLAMA), field: value})
