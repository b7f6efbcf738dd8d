"""Stage 1: the base model, and the one place where its residual stream is read and written."""
