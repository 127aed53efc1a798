"""Teaches a small language model to reason, with a large one as its tutor."""
