"""How batches of episodes are played."""
