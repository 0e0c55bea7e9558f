from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# The networks of the zoo, and the helpers of the other tests.
sys.path[:0] = [str(HERE), str(HERE.parent)]
