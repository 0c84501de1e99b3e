from blastnn.factorize import factorize
from blastnn.structures import Blast, LowRank
from blastnn.linear import StructuredLinear
