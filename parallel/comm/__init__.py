"""Collectives and transfers over one group of ranks, and the choice of their algorithm."""
