"""What the command line shows: one module for each thing that is shown."""

from __future__ import annotations

from blastnn.display.bench import print_bench as print_bench
from blastnn.display.export import print_export as print_export
from blastnn.display.folder import print_inspection as print_inspection
from blastnn.display.folder import print_quantized as print_quantized
from blastnn.display.kernels import print_kernels as print_kernels
from blastnn.display.plan import print_plan as print_plan
from blastnn.display.progress import make_progress as make_progress
from blastnn.display.scores import print_scores as print_scores
from blastnn.display.solvers import print_solvers as print_solvers
from blastnn.display.summary import print_summary as print_summary
from blastnn.display.sweep import SweepReporter as SweepReporter
from blastnn.display.sweep import print_sweep as print_sweep
from blastnn.display.table import print_json as print_json
from blastnn.display.tasks import print_tasks as print_tasks
from blastnn.display.tasks import task_progress as task_progress
