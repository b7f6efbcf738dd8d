"""What the served models decided."""
