"""Text to ids and back with the published tokenizers."""

import shutil

import numpy as np
import pytest
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from distill_jax.tokenizer import BEGINS, BLANK, ENDS, Tokenizer, load_tokenizer

PUBLISHED = [
    "tokenizers/gpt2",
    "tokenizers/gpt-j",
    "tokenizers/gpt-neox",
    "tokenizers/opt",
    "tokenizers/qwen2",
    "stories260k",
    "babyllama-361",
]
PROMPT = "Question: Tom has 5 eggs and 3 more.\nHow many?\nReasoning:"
TARGET = " 5 + 3 = 8, “so” he has  eight.\n\nAnswer: 8"


@pytest.fixture(scope="module", params=PUBLISHED)
def directory(request, shared):
    return shared / "models" / request.param


@pytest.fixture(scope="module")
def tokenizer(directory) -> Tokenizer:
    return load_tokenizer(str(directory))


def test_a_prompt_has_the_ids_that_are_published(tokenizer, directory):
    published = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    expected = published(PROMPT)["input_ids"]
    assert tokenizer.encode_prompt(PROMPT) == expected
    begins = {"opt": [2], "stories260k": [1], "babyllama-361": [1]}.get(directory.name, [])
    assert tokenizer.encode_prompt("") == begins
    assert expected[: len(begins)] == begins
    assert expected[len(begins)] not in begins  # not doubled


TEXTS = [
    *(
        "",
        " leading",
        "trailing ",
        "two  spaces",
        "a\tb",
        "\n\n",
        "1234567",
        "caf\u00e9 \ufb01 \u00bd",
    ),
    *("don't I'll '", "\u4f60\u597d \U0001f600", PROMPT, PROMPT + TARGET),
]


@pytest.mark.parametrize("name", ["gpt2", "gpt-j", "gpt-neox", "opt", "qwen2", "flan-t5"])
def test_ids_are_those_that_transformers_and_servers_use(name, shared):
    """T5's file alone would keep a space at the end of a text."""
    directory = shared / "models" / "tokenizers" / name
    ours = load_tokenizer(str(directory))
    published = transformers.AutoTokenizer.from_pretrained(directory)
    ends = [ours.end_id] if name == "flan-t5" else []
    for text in TEXTS:
        assert [*ours.encode_prompt(text), *ends] == published(text)["input_ids"], repr(text)
        assert ours.num_tokens <= len(published)


def test_what_looks_special_is_text(tokenizer):
    text = "Say </s> or <s> or <|endoftext|> now"
    ids = tokenizer.encode_prompt(text)
    assert tokenizer.end_id not in ids[1:]
    assert tokenizer.decode(ids).strip() == text


def test_the_boundary_is_clean(tokenizer):
    ids = tokenizer.encode_target(PROMPT, TARGET)
    assert ids[-1] == tokenizer.end_id
    assert ids.count(tokenizer.end_id) == 1
    assert tokenizer.decode(ids) == TARGET
    joint = tokenizer.encode_prompt(PROMPT + TARGET)
    assert [*tokenizer.encode_prompt(PROMPT), *ids] == [*joint, tokenizer.end_id]


@pytest.mark.parametrize(
    ("prompt", "target"),
    [
        ("The", "re is"),
        ("Reasoning:\n", "\nTom"),
        ("a ", " b"),
        ("1", "2"),
        ("x:", ": y"),
        ("", "Hi"),
    ],
)
def test_tokens_across_the_boundary_leave_the_prompt_alone(tokenizer, prompt, target):
    ids = tokenizer.encode_target(prompt, target)
    assert tokenizer.decode(ids).lstrip(" ") == target.lstrip(" ")
    if prompt:
        assert tokenizer.decode(ids) == target
    assert max(ids) < tokenizer.num_tokens


def test_a_word_cut_by_the_boundary_gains_no_space(shared):
    """Split on its own, "e cat" would begin with the mark of a new word."""
    pieces = load_tokenizer(str(shared / "models/stories260k"))
    joint = pieces.encode_prompt("The cat")
    prompt, ids = pieces.encode_prompt("Th"), pieces.encode_target("Th", "e cat")
    assert joint[: len(prompt)] != prompt
    assert pieces.decode(ids) == "e cat"


def test_newlines_are_those_of_the_decoded_tokens(tokenizer):
    newlines = tokenizer.newlines
    assert newlines.dtype == np.uint8
    assert newlines.shape == (tokenizer.num_tokens,)
    line = tokenizer.encode_target("x", "\n")[0]
    assert newlines[line] == BEGINS + ENDS
    for i in np.random.default_rng(0).choice(np.flatnonzero(newlines), 20):
        text = tokenizer.decode([int(i)])
        assert bool(newlines[i] & BEGINS) == text.startswith("\n")
        assert bool(newlines[i] & ENDS) == text.endswith("\n")
        assert bool(newlines[i] & BLANK) == ("\n\n" in text)
    plain = tokenizer.encode_target("x", " eggs")[:-1]
    assert not newlines[plain].any()


def test_blank_lines_that_are_one_token(shared):
    blank = load_tokenizer(str(shared / "models/tokenizers/gpt2"))
    (token,) = blank.encode_target("x", "\n\n")[:-1]
    assert blank.newlines[token] == BEGINS + ENDS + BLANK


def test_ids_that_mean_something(shared):
    sizes = {"gpt2": 50257, "gpt-j": 50257, "gpt-neox": 50277, "opt": 50265, "qwen2": 151646}
    sizes["flan-t5"] = 32100
    for name, size in sizes.items():
        assert load_tokenizer(str(shared / "models/tokenizers" / name)).num_tokens == size


def test_a_model_without_an_end(shared):
    digits = load_tokenizer(str(shared / "models/mathgpt-add3"))
    assert (digits.begin_id, digits.end_id, digits.num_tokens) == (None, None, 10)
    assert digits.encode_prompt("123456") == [1, 2, 3, 4, 5, 6]
    assert digits.encode_target("123456", "579") == [5, 7, 9]
    assert digits.decode([5, 7, 9]) == "579"
    assert not digits.newlines.any()


def test_saved_and_read_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = load_tokenizer(str(tmp_path))
    assert again.encode_prompt(PROMPT) == tokenizer.encode_prompt(PROMPT)
    assert again.encode_target(PROMPT, TARGET) == tokenizer.encode_target(PROMPT, TARGET)
    assert (again.num_tokens, again.end_id) == (tokenizer.num_tokens, tokenizer.end_id)


def test_words_of_our_own():
    backend = Backend(models.WordLevel({"<end>": 0, "?": 1, "Tom": 2, "has": 3, "\n": 4}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    own = Tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    )
    assert own.encode_target("Tom", " has") == [3, 0]
    assert (own.end_id, own.begin_id, own.num_tokens) == (0, None, 5)


def test_directories_without_tokenizer_json(tmp_path, shared):
    source = shared / "models/tokenizers/gpt2"
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copyfile(source / name, tmp_path / name)
    new, old = load_tokenizer(str(source)), load_tokenizer(str(tmp_path))
    assert old.encode_target(PROMPT, TARGET) == new.encode_target(PROMPT, TARGET)


def test_broken_directories_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; a student needs one"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not JSON"):
        load_tokenizer(str(tmp_path))
