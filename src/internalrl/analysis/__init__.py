"""Looking at what a run has learned: probes, evaluation on any task, and the report."""
