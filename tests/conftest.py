"""Settings of all tests."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Neither a deadline per example nor one for their generation: both fail tests when the machine is slow.
settings.register_profile("nohype", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("nohype")
