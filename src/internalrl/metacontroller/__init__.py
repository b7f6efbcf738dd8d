"""The method: the metacontroller's equations, the steered model and its adapters."""
