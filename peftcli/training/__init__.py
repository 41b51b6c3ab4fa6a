"""The loop: stages, optimiser, exact checkpoints, named checks."""
