"""Optimizers, learning-rate schedules and their configuration."""
