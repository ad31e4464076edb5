# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""From what judges say to the figures of a row."""

from typing import NamedTuple


class Estimate(NamedTuple):
    """A figure, and the ends of its 95 % interval."""

    value: float
    low: float
    high: float
