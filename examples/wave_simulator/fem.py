"""The 2-D wave equation `u_tt = div(c^2 grad u)` on the unit square, zero at its edges: bilinear finite elements and Newmark's average acceleration.

Average acceleration (beta 1/4, gamma 1/2) of `M u'' + K u = 0` is the trapezoidal rule: with velocities `v`,
`(M + dt^2/4 K) v' = (M - dt^2/4 K) v - dt K u` and `u' = u + dt/2 (v + v')`. One factorization serves every step, no step is too long to be stable, and the
energy `(v M v + u K u) / 2` is kept exactly (Newmark 1959; Hughes, The Finite Element Method, chapter 9).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ...ir.errors import MissingExtraError

Array = np.ndarray
Speed = Callable[[Array, Array], Array]


@dataclass(frozen=True)
class Frames:
    """Fields `u: [trajectories, frames, nodes, nodes] float64` (axes: frame, x, y) and the energy in each frame `[trajectories, frames]`."""

    u: Array
    energy: Array

    @property
    def drift(self) -> float:
        """Largest change of a trajectory's energy, relative to its start."""
        return float((np.abs(self.energy - self.energy[:, :1]) / self.energy[:, :1]).max())


class WaveEquation:
    """`nodes` x `nodes` grid points and one medium, `speed(x, y)` (1 where none is given); `dt` is half the mesh width by default."""

    def __init__(self, nodes: int, speed: Speed | None = None, dt: float | None = None) -> None:
        if nodes < 3:
            raise ValueError(f"WaveEquation: expected at least 3 nodes along an axis, got {nodes}")
        try:
            from scipy.sparse.linalg import splu
            from skfem import Basis, BilinearForm, ElementQuad1, MeshQuad
            from skfem.helpers import dot, grad
        except ImportError as error:
            raise MissingExtraError("scikit-fem", "wave", "the wave simulator") from error
        ticks = np.linspace(0, 1, nodes)
        basis = Basis(MeshQuad.init_tensor(ticks, ticks), ElementQuad1())
        squared = (lambda x, y: np.ones_like(x)) if speed is None else lambda x, y: speed(x, y) ** 2
        mass = BilinearForm(lambda u, v, w: u * v).assemble(basis)
        stiffness = BilinearForm(lambda u, v, w: squared(*w.x) * dot(grad(u), grad(v))).assemble(basis)
        places = np.rint(basis.doflocs * (nodes - 1)).astype(int)
        order = np.lexsort((places[1], places[0]))  # node i * nodes + j of the grid is degree of freedom order[i * nodes + j]
        inside = order.reshape(nodes, nodes)[1:-1, 1:-1].ravel()
        self.nodes, self.dt = nodes, dt if dt is not None else 0.5 / (nodes - 1)
        self.mass, self.stiffness = (m.tocsr()[inside][:, inside].tocsc() for m in (mass, stiffness))
        self._back = self.mass - self.dt**2 / 4 * self.stiffness
        self._solve = splu(self.mass + self.dt**2 / 4 * self.stiffness).solve

    def run(self, start: Array, steps: int, *, every: int = 1) -> Frames:
        """From rest at `start: [trajectories, nodes, nodes]` over `steps` time steps; one frame every `every` steps, the start included; edges are zero."""
        u = start[:, 1:-1, 1:-1].reshape(len(start), -1).T.astype(np.float64)
        v, frames, energy = np.zeros_like(u), [u], [self.energy(u, 0 * u)]
        for step in range(1, steps + 1):
            faster = self._solve(self._back @ v - self.dt * (self.stiffness @ u))
            u, v = u + self.dt / 2 * (v + faster), faster
            if step % every == 0:
                frames.append(u)
                energy.append(self.energy(u, v))
        inner = np.stack(frames).transpose(2, 0, 1).reshape(len(start), len(frames), self.nodes - 2, self.nodes - 2)
        return Frames(np.pad(inner, ((0, 0), (0, 0), (1, 1), (1, 1))), np.stack(energy, 1))

    def energy(self, u: Array, v: Array) -> Array:
        """Of each column of `u` and `v: [inner nodes, trajectories]`."""
        return ((v * (self.mass @ v)).sum(0) + (u * (self.stiffness @ u)).sum(0)) / 2
