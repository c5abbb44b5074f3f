"""Measure capsule routing against plain PyTorch: time in turns, memory in fresh processes, results first."""
