"""Brings the emulated GPU into this Python process, where PYTHONPATH names this folder.

Where there can be none, HOSTCUDA_UNAVAILABLE says why, and the process goes on without.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))
try:
    import hostcuda  # noqa: F401
except ImportError as error:
    os.environ["HOSTCUDA_UNAVAILABLE"] = str(error)
