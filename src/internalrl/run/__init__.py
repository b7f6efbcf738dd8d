"""Run folders, checkpoints, the resumable loop, random streams."""
