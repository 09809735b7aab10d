"""For every test: one thread per process (tiny bases gain nothing from more, and two workers share two cores), no test that
fails because a machine is slow, and Ctrl-C as a terminal sends it: a shell that starts the suite in the background has it
ignored, and children inherit that."""

from __future__ import annotations

import os
import signal

from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
signal.signal(signal.SIGINT, signal.default_int_handler)
settings.register_profile("tritune", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tritune")
