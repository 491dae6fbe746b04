"""Tensor parallelism, applied from outside to a plain model."""
