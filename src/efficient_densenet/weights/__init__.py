"""Weights in files: one safe reader, the names of every library, and weights that are known by name.

Nothing here knows what a network is; `checkpoints` does.
"""
