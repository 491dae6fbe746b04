"""Where state lives that does not fit on the device: tiers, stores and asynchronous copies."""
