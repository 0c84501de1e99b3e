"""Factors times activations, fast: one file a kernel, chosen by a visible table."""

from blastnn.kernels.dispatch import TABLE as TABLE
from blastnn.kernels.dispatch import Choice as Choice
from blastnn.kernels.dispatch import choose as choose
from blastnn.kernels.dispatch import matmul as matmul
from blastnn.kernels.dispatch import number_of as number_of
from blastnn.kernels.explain import explain as explain
from blastnn.kernels.explain import fix_choices as fix_choices
from blastnn.kernels.explain import winners as winners
from blastnn.kernels.measure import measure as measure
from blastnn.kernels.worth import predicted_speedup as predicted_speedup
