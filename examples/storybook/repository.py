# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Puts the examples on the path, and by them the whole repository: a clone works without being installed."""

import sys
from pathlib import Path


sys.path.append(str(Path(__file__).resolve().parents[1]))

from muse_examples import REPOSITORY as ROOT  # noqa: E402, F401
