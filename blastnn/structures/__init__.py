"""The structures. A new one is one file here, with a ``@register``, and one line in this file."""

from __future__ import annotations

from blastnn.structures.base import Factors as Factors
from blastnn.structures.base import Structure as Structure
from blastnn.structures.base import cast_factors as cast_factors
from blastnn.structures.blast import Blast as Blast
from blastnn.structures.block_diagonal import BlockDiagonal as BlockDiagonal
from blastnn.structures.block_low_rank import BlockLowRank as BlockLowRank
from blastnn.structures.block_low_rank import Monarch as Monarch
from blastnn.structures.block_sparse import SparseLowRank as SparseLowRank
from blastnn.structures.blr2 import BLR2 as BLR2
from blastnn.structures.channels import Channels as Channels
from blastnn.structures.gblr import GBLR as GBLR
from blastnn.structures.lowrank import LowRank as LowRank
from blastnn.structures.pixelfly import Pixelfly as Pixelfly
from blastnn.structures.registry import STRUCTURES as STRUCTURES
from blastnn.structures.registry import register as register
from blastnn.structures.registry import spec_from_json as spec_from_json
from blastnn.structures.registry import structure_named as structure_named
from blastnn.structures.sum import Sum as Sum
