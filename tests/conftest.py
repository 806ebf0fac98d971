"""`launch/` is a folder of scripts, not a package: its modules are imported as the scripts import them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "launch"))

torch.set_num_threads(1)  # tiny operations: two threads that wait for each other are slower than one
