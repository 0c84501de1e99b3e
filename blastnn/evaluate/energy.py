"""Energy, where the machine tells: the processor's counters (RAPL), or a GPU's (NVML)."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import torch

POWERCAP = Path("/sys/class/powercap")
NOTHING = "no counter: neither RAPL under /sys/class/powercap nor a GPU's can be read here"


class EnergyMeter:
    """Joules used between two readings.

    Attributes:
        source: what is read; None where nothing can be.
        reason: why nothing can be read; None where something is.
    """

    def __init__(self, device: torch.device, folder: Path = POWERCAP) -> None:
        self.source: str | None = None
        self.reason: str | None = None
        self._packages: list[Path] = []
        self._gpu: int | None = None
        if device.type == "cuda":
            self._open_gpu(device)
        else:
            self._open_packages(folder)

    def read(self) -> dict[str, int]:
        """The counters now, in microjoules."""
        if self._gpu is not None:
            return {"gpu": _gpu_millijoules(self._gpu) * 1000}
        return {str(package): _number(package / "energy_uj") for package in self._packages}

    def joules(self, before: dict[str, int], after: dict[str, int]) -> float | None:
        """Between two readings; None where nothing can be read."""
        if self.source is None:
            return None
        used = 0
        for name, start in before.items():
            used += after[name] - start
            if after[name] < start:  # the counter went round once
                used += _number(Path(name) / "max_energy_range_uj")
        return used / 1e6

    def _open_packages(self, folder: Path) -> None:
        # intel-rapl:0 is a package (AMD's too); intel-rapl:0:0 is a part of it.
        packages = sorted(folder.glob("intel-rapl:[0-9]")) + sorted(folder.glob("intel-rapl:??"))
        try:
            for package in packages:
                _number(package / "energy_uj")
        except OSError as error:
            self.reason = f"RAPL is there but cannot be read: {error}"
            return
        self._packages = packages
        if packages:
            self.source = "RAPL, all processor packages of the machine, whoever uses them"
        else:
            self.reason = NOTHING

    def _open_gpu(self, device: torch.device) -> None:
        index = device.index or 0
        try:
            _gpu_millijoules(index)
        except (RuntimeError, ImportError, AttributeError) as error:
            self.reason = f"{NOTHING} ({error})"
            return
        self._gpu = index
        self.source = "NVML, the whole GPU"


def _number(path: Path) -> int:
    return int(path.read_text())


def _gpu_millijoules(index: int) -> int:
    # torch opens NVML for its own power reading and keeps the handle by visible device.
    handle = torch.cuda._get_pynvml_handler(index)
    return int(import_module("pynvml").nvmlDeviceGetTotalEnergyConsumption(handle))
