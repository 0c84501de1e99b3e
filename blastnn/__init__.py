"""Smaller, faster neural networks with BLAST and other structured matrices.

Importing the package lets transformers load compressed models: after ``import blastnn``,
``AutoModelForCausalLM.from_pretrained(folder)`` works on what ``blastnn compress`` wrote.
"""

from blastnn import integrations
from blastnn.compress.api import compress_checkpoint
from blastnn.compress.in_memory import CompressionResult, compress
from blastnn.compress.options import Options
from blastnn.errors import BlastnnError
from blastnn.factorize import FactorizationResult, factorize, factorize_many
from blastnn.integrations.transformers import load_model
from blastnn.linear import StructuredLinear
from blastnn.structures import Blast, LowRank, Structure
from blastnn.version import __version__

__all__ = [
    "Blast",
    "BlastnnError",
    "CompressionResult",
    "FactorizationResult",
    "LowRank",
    "Options",
    "Structure",
    "StructuredLinear",
    "__version__",
    "compress",
    "compress_checkpoint",
    "factorize",
    "factorize_many",
    "integrations",
    "load_model",
]
