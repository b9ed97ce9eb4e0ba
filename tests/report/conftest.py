"""Shared by the tests of reports: the invented records stand in a module of their own beside this file."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
