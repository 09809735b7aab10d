"""For every test: one thread per process. Tiny bases gain nothing from more, and two workers share two cores."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
