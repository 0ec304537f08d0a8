"""What a call launches, worked out once a problem."""

from functools import cache, lru_cache

from fused_na.triton import autotune
from fused_na.triton.geometry import Geometry
from fused_na.triton.launch import Prepared
from fused_na.triton.prepare import PREPARE
from fused_na.triton.problem import Problem, Tensors
from fused_na.triton.tiles import choose_tiles


class Plan:
    """One kernel of a problem, a key of `PREPARE`, with its tiles once it has run."""

    def __init__(self, kernel: str, problem: Problem) -> None:
        self.kernel, self.problem = kernel, problem
        self.prepared: Prepared | None = None

    def run(self, tensors: Tensors) -> Tensors:
        """Launches the kernel on the tensors that it reads and writes; returns its workspaces."""
        device = self.problem.device
        if self.prepared is not None:
            return self.prepared.run(tensors, device)
        geometry = Geometry(self.problem)
        prepared = cache(lambda tiles: PREPARE[self.kernel](geometry, tiles))
        tiles = None
        is_measured = self.problem.is_autotuned and self.kernel != "query_bias"  # of which there is one choice
        if is_measured:
            tiles = autotune.measured_tiles(
                self.kernel, geometry.workload, lambda tiles: prepared(tiles).run(tensors, device)
            )
        choice = prepared(tiles or choose_tiles(self.kernel, geometry.workload))
        if tiles or not is_measured:  # else nothing could be measured yet
            self.prepared = choice
        return choice.run(tensors, device)


@lru_cache(maxsize=4096)
def plan_of(kernel: str, problem: Problem) -> Plan:
    """The plan that all calls on a problem share."""
    return Plan(kernel, problem)


@lru_cache(maxsize=4096)
def fuses_bias(problem: Problem) -> bool:
    """Whether the query's and the bias's gradients come from one kernel."""
    return Geometry(problem).fuses_bias
