"""The metacontroller and the steered model."""
