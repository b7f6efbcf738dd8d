"""Stage 3: internal RL, reinforcement learning on the codes."""
