"""What ``blastnn bench`` can be asked for; light, so that the command line can show it at once."""

from __future__ import annotations

from dataclasses import dataclass

from blastnn.errors import MeasurementError


def check_device(device: str) -> None:
    """Raise MeasurementError where there is no such device; only others than cpu import torch."""
    if device == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise MeasurementError(
            f"there is no device {device!r} here; leave it out (cpu), or name one that torch sees"
        ) from error


@dataclass(frozen=True)
class BenchOptions:
    """What to measure.

    Attributes:
        batches: sequences at once.
        prompts: tokens in a prompt.
        new_tokens: steps in a run of decoding.
        rounds: counted runs of each model.
        compiled: whether the step is compiled.
        device: where.
    """

    batches: tuple[int, ...] = (1, 8)
    prompts: tuple[int, ...] = (128, 1024)
    new_tokens: int = 32
    rounds: int = 5
    compiled: bool = True
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("batches", "prompts", "new_tokens", "rounds"):
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            if not values or min(values) < 1:
                raise MeasurementError(f"{name} must be whole numbers of at least 1, not {value}")
        check_device(self.device)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Every batch with every prompt length."""
        return [(batch, prompt) for batch in self.batches for prompt in self.prompts]
