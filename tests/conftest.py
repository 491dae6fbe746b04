"""Settings shared by all tests."""

from __future__ import annotations

from hypothesis import settings

# Deadlines measure the machine as much as the code; on shared cores they fail at random.
settings.register_profile("atoll", deadline=None, max_examples=60)
settings.load_profile("atoll")
