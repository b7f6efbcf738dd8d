"""Continuous batching of steered language models, without HTTP."""
