"""Programs written in idioms, and a sandbox to run them in."""
