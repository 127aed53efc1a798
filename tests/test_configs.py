"""The configs that are shipped, and the knobs that they turn."""

import ast
from pathlib import Path

import pytest

import distill_jax
from distill_jax.config import knobs
from distill_jax.config_file import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PACKAGE = Path(distill_jax.__file__).parent


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_loads_and_says_what_it_is(path: Path):
    load_config(path)
    lines = path.read_text().splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert len(lines) <= 60
    assert any("distill-jax run" in line for line in header), "the header names the command"
    assert not any(part in path.read_text() for part in ("../", "/home", "/root"))


def test_every_knob_is_read_by_somebody():
    read = {
        node.attr
        for path in PACKAGE.rglob("*.py")
        if path.name != "config.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }
    unread = [name for name in knobs() if name.split(".")[-1] not in read]
    assert not unread, f"knobs that nobody reads: {unread}"
