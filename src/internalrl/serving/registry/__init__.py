"""Versions of adapters."""
