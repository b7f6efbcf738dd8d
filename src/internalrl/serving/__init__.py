"""Steered models behind an API: engine, server, registry, audit, limits."""
