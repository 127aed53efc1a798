"""What is learned from a refusal, and what is not."""

import pytest

from distill_jax.config import TeacherConfig
from distill_jax.teacher.dialect import Dialect

CONFIG = TeacherConfig(model="m")


@pytest.mark.parametrize(
    ("error", "learned"),
    [
        (
            {
                "message": "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead.",
                "param": "max_tokens",
                "code": "unsupported_parameter",
            },
            Dialect("max_completion_tokens"),
        ),
        (
            {
                "message": "Unsupported value: 'temperature' does not support 0.7 with this model. "
                "Only the default (1) value is supported.",
                "param": "temperature",
                "code": "unsupported_value",
            },
            Dialect(unsent=("temperature",)),
        ),
        ({"detail": [{"loc": ["body", "top_p"], "msg": "Extra inputs are not permitted"}]},
         Dialect(unsent=("top_p",))),
        ({"message": "[{'type': 'extra_forbidden', 'loc': ('body', 'n')}]"},
         Dialect(one_by_one=True)),
        ({"message": "unknown field `n`"}, Dialect(one_by_one=True)),
        ("n is not supported", None),  # a letter without quotes may be any word
        ({"message": "temperature must be between 0 and 1"}, None),  # a value, to be set right
        ({"message": "Unsupported model", "param": "model"}, None),
        ("", None),
        (None, None),
    ],
)  # fmt: skip
def test_refusals(error, learned):
    sent = Dialect().body(CONFIG, "p", max_tokens=9)
    assert Dialect().learn(sent, num_samples=2, error=error) == learned


@pytest.mark.parametrize(
    "error",
    [
        {"message": "You are not allowed to request logprobs from this model"},
        {"message": "Logprobs is not enabled for models/m", "code": 400},
        {"message": "unknown", "param": "top_logprobs"},
        {"detail": [{"loc": ["body", "top_logprobs"], "msg": "Extra inputs are not permitted"}]},
    ],
)
def test_likelihoods_are_given_up_together(error):
    sent = Dialect().body(CONFIG, "p", max_tokens=9, alternatives=5)
    assert (sent["logprobs"], sent["top_logprobs"]) == (True, 5)
    without = Dialect(unsent=("logprobs",))
    assert Dialect().learn(sent, num_samples=2, error=error) == without
    plain = Dialect().body(CONFIG, "p", max_tokens=9)
    assert without.body(CONFIG, "p", max_tokens=9, alternatives=5) == plain
    assert Dialect().learn(plain, num_samples=2, error=error) is None


def test_every_part_can_be_given_up_once():
    dialect, error = Dialect(), "unsupported: max_tokens, temperature, top_p, 'n'"
    for _ in range(4):
        body = dialect.body(CONFIG, "p", max_tokens=9)
        learned = dialect.learn(body, num_samples=1 if dialect.one_by_one else 2, error=error)
        assert learned is not None and learned != dialect
        dialect = learned
    body = dialect.body(CONFIG, "p", max_tokens=9)
    assert dialect.learn(body, num_samples=1, error=error) is None
    assert set(body) == {"model", "messages", "max_completion_tokens"}
    assert Dialect.from_json(dialect.to_json()) == dialect
