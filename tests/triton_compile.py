"""Compile every Triton kernel for GPUs that need not be there, with ptxas, and run none of them.

What the interpreter cannot see: that Triton's compiler takes the code, in bfloat16 too, and that
the tiles fit registers and shared memory. test_triton.py runs this file in a process of its own,
without the interpreter.

    python -m tests.triton_compile [--all]
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from blastnn.kernels import triton_decode, triton_prefill

UNIT_STRIDES = {"x_n", "S_r", "V_r", "U_r", "y_m"}
# Compute capability and its shared memory for one program, in bytes.
GPUS = {80: 166_912, 90: 232_448}


def settings_of(dtype: str):
    """Every kernel, with the sizes that its launcher sets."""
    how = {"PRECISION": "ieee" if dtype == "fp32" else "tf32"}
    yield triton_decode._project, {"BT": 16, **how}
    for coupled in (1, 16):
        yield (
            triton_decode._couple_and_expand,
            {"CT": coupled, "BT": 16, "BJ": 16, **how},
        )
    for group in (16, 1):
        yield triton_prefill._project_and_couple, {"BI": group, **how}
    yield triton_prefill._expand, how


def compiled(kernel, sizes, config, dtype: str, gpu: int):
    """The binary of one kernel in one configuration; contiguous tensors, sizes divisible by 16."""
    names = kernel.fn.arg_names
    constants = {**sizes, **config.kwargs, **{name: 1 for name in UNIT_STRIDES & set(names)}}
    signature, hints = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        pointer = len(name) == 1 and name in "xzwyUSV"
        signature[name] = f"*{'fp32' if name == 'z' else dtype}" if pointer else "i32"
        if name not in ("tokens", "b1", "b2"):
            hints[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel.fn, signature, {(names.index(k),): v for k, v in constants.items()}, hints
    )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", gpu, 32), options=options)


def registers(binary: bytes) -> str:
    """What ptxas used, as cuobjdump tells it: registers, stack (spills), local memory."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        told = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True)
    return " ".join(word for word in told.stdout.split() if word[:4] in ("REG:", "STAC", "LOCA"))


def main() -> None:
    """One configuration of each kernel, or all of them; a line for each."""
    everything = "--all" in sys.argv
    for gpu, memory in GPUS.items():
        for dtype in ("bf16", "fp16", "fp32") if everything else ("bf16",):
            for kernel, sizes in settings_of(dtype):
                fit = kernel.early_config_prune(kernel.configs, {}, **sizes)
                for one in fit if everything else fit[1:2]:
                    binary = compiled(kernel, sizes, one, dtype, gpu)
                    assert binary.metadata.shared <= memory
                    used = registers(binary.asm["cubin"])
                    name = kernel.fn.__name__
                    print(f"sm_{gpu} {dtype} {name} {sizes} {one}: {used}", flush=True)


if __name__ == "__main__":
    main()
