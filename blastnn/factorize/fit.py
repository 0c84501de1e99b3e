r"""Any structure at all, by gradients: ``minimise || (A - A^) L ||_F^2 / || A L ||_F^2``.

The loss goes through ``spec.to_dense`` and autograd, so nothing but the contract is needed: a
structure of one's own, registered or not, can be factorised before it has a solver. All factors are
fitted at once by L-BFGS with a strong Wolfe line search; index factors, and factors in which the
matrix moves in steps, stay as they start. One evaluation costs a dense ``(m, n)`` matrix and, with
a second moment, its product with ``L (n, n)``. It stands last among the solvers: one that knows its
structure is faster and, as a rule, better.
"""

from __future__ import annotations

import math
import time

import torch
from torch import Tensor

from blastnn.errors import FactorizationError
from blastnn.factorize.problem import Problem
from blastnn.factorize.result import Solution
from blastnn.structures import Structure, cast_factors

STRUCTURES = (Structure,)
USES_SECOND_MOMENT = True
WHY = "needs the dense matrix alone, and so fits any structure"

STEPS = 200
STARTS = ("auto", "init")
# Pairs of steps and gradient changes that stand for the inverse Hessian.
HISTORY = 20
# Evaluations of the loss that one line search may take.
EVALUATIONS = 25


def solve(
    problem: Problem, spec: Structure, seed: int, steps: int = STEPS, start: str = "auto"
) -> Solution:
    """Descend from a start; what is returned is never worse than that start.

    Args:
        steps: of L-BFGS, at most.
        start: ``"auto"`` is what the first other solver that fits the structure finds, or ``init``
            where there is none; ``"init"`` is the spec's own ``init`` from ``seed``, scaled to
            ``A`` by a power of two.

    Raises:
        FactorizationError: an unknown start.
    """
    clock = time.perf_counter()
    if start not in STARTS:
        raise FactorizationError(f"start must be one of {STARTS}, but is {start!r}")
    factors, origin = _start(problem, spec, seed, start)
    descent = _Descent(problem, spec, cast_factors(factors, problem.compute_dtype))
    history = [(time.perf_counter() - clock, descent.exact_error())]
    best, best_error, status = descent.factors(), history[0][1], f"ran its {steps} steps"
    for _ in range(steps):
        descent.step()
        error = descent.exact_error()
        if not error < best_error:
            status = "converged: the error no longer falls"
            break
        best, best_error = descent.factors(), error
        history.append((time.perf_counter() - clock, error))
    return Solution(best, history, f"{status}; started from {origin}")


def _start(
    problem: Problem, spec: Structure, seed: int, start: str
) -> tuple[dict[str, Tensor], str]:
    """The factors to start from and their origin in words."""
    # Inside the function: the registry imports this module.
    from blastnn.factorize import SOLVERS

    own = STRUCTURES
    for name, module in SOLVERS.items():
        usable = module.USES_SECOND_MOMENT or problem.moment is None
        if (
            start == "auto"
            and own != module.STRUCTURES
            and usable
            and isinstance(spec, module.STRUCTURES)
        ):
            return module.solve(problem, spec, seed).factors, f"solver {name!r}"
    factors = spec.init(seed=seed, dtype=torch.float64, device=problem.weight.device)
    size = float(problem.weight.square().mean().sqrt()) * math.sqrt(spec.in_features)
    return spec.scaled(factors, round(math.log2(size))), "the structure's init"


class _Descent:
    """L-BFGS on the free factors of one problem."""

    def __init__(self, problem: Problem, spec: Structure, factors: dict[str, Tensor]) -> None:
        self.problem, self.spec, self.fixed = problem, spec, factors
        self.free = {
            name: factors[name].clone(memory_format=torch.contiguous_format).requires_grad_()
            for name in spec.factor_shapes()
            if name not in spec.step_factors()
        }
        self.weight = problem.weight.to(problem.compute_dtype)
        self.root = None if problem.root is None else problem.root.to(problem.compute_dtype)
        self.optimizer = torch.optim.LBFGS(
            list(self.free.values()),
            max_iter=1,
            max_eval=EVALUATIONS,
            tolerance_grad=0.0,
            tolerance_change=0.0,
            history_size=HISTORY,
            line_search_fn="strong_wolfe",
        )

    def loss(self) -> Tensor:
        """The squared relative error, differentiable."""
        residual = self.weight - self.spec.to_dense({**self.fixed, **self.free})
        weighted = residual if self.root is None else residual @ self.root
        return weighted.square().sum() / self.problem.energy

    @torch.enable_grad()
    def step(self) -> None:
        """One step of L-BFGS; ``factorize`` runs without gradients, so they are enabled here."""

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.loss()
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def factors(self) -> dict[str, Tensor]:
        """Copies of all factors as they are now."""
        return {**self.fixed, **{name: f.detach().clone() for name, f in self.free.items()}}

    def exact_error(self) -> float:
        """The relative error in float64, which the last digits of a float32 loss would hide."""
        dense = self.spec.to_dense(cast_factors(self.factors(), torch.float64))
        return self.problem.objective_error(dense)
