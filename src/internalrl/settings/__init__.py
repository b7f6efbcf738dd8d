"""Settings: options of stages, presets, and their reading from YAML and run folders."""
