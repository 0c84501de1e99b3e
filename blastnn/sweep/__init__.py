"""Methods times budgets: every combination compressed and scored, in one table and one picture.

``run_sweep`` is what ``blastnn sweep`` calls; a method is one entry of ``METHODS``.
"""

from __future__ import annotations

from blastnn.sweep.methods import METHODS as METHODS
from blastnn.sweep.methods import Method as Method
from blastnn.sweep.request import Sweep as Sweep
from blastnn.sweep.run import SweepProgress as SweepProgress
from blastnn.sweep.run import run_sweep as run_sweep
