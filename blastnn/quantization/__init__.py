"""Large factors in 8 or 4 bits: the layout on disk and in memory, rounding, and the way back."""

from blastnn.quantization.factors import dequantize_factors as dequantize_factors
from blastnn.quantization.factors import quantize_factors as quantize_factors
from blastnn.quantization.layout import QUANTIZATIONS as QUANTIZATIONS
from blastnn.quantization.layout import SCALE as SCALE
from blastnn.quantization.layout import SCALE_DTYPE as SCALE_DTYPE
from blastnn.quantization.layout import Form as Form
from blastnn.quantization.layout import Quantization as Quantization
from blastnn.quantization.layout import check_stored as check_stored
from blastnn.quantization.layout import dtype_fits as dtype_fits
from blastnn.quantization.layout import quantization_named as quantization_named
from blastnn.quantization.layout import stored_bytes as stored_bytes
from blastnn.quantization.layout import stored_forms as stored_forms
from blastnn.quantization.rounding import dequantize_tensor as dequantize_tensor
from blastnn.quantization.rounding import quantize_tensor as quantize_tensor
