"""`python -m distill_jax`: the commands, where the script is not on the path."""

from distill_jax.cli import app

app()
