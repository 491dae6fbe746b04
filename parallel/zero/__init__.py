"""ZeRO: gradients and optimizer state of units spread over data-parallel ranks."""
