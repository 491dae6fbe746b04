"""Datasets: building token shards, reading them, and the order in which samples are seen."""
