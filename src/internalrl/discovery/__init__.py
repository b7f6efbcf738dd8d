"""Stage 2: discovery of abstract actions, and consolidation (stage 2b)."""
