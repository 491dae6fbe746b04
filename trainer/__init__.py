"""The trainer: run configuration, data, models, the training loop and what it writes."""
