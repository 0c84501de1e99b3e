"""The dtypes that weights and inputs may have, by the names that users and files give them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from blastnn.errors import DtypeError

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_named(name: str, among: Mapping[str, torch.dtype] = DTYPES) -> torch.dtype:
    """The dtype of that name.

    Raises:
        DtypeError: it is not ``among`` those that can be chosen.
    """
    if name not in among:
        raise DtypeError(f"dtype must be one of {', '.join(among)}, but is {name!r}")
    return among[name]


def name_of(dtype: torch.dtype) -> str:
    """The name of any dtype, as it stands in files: ``float32`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")
