"""Checkpoints: saved at one layout, loaded at any other."""
