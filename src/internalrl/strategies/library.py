"""Strategies: what an adapter's codes come to, as regions around centroids that a person can name.

Discovery draws codes towards N(0, I), so every direction has the same scale and distance is Euclidean. A code belongs
to the nearest centroid: within that strategy's radius it is *known*, beyond it *unknown*. A strategy's region is thus a
Voronoi cell cut by a ball. It is convex and its centroid is inside, so its nearest point can be computed exactly.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq, nnls
from scipy.spatial.distance import cdist

from internalrl.controller.adapter import CONFIG_FILE, TENSOR_FILE, read_config, read_tensors
from internalrl.errors import InternalRLError, OptionError
from internalrl.run.files import read_file, write_atomic
from internalrl.settings.ranges import Checked, Count, Fraction, Positive, Range
from internalrl.settings.schema import from_dict, to_dict

STRATEGIES_FILE = "strategies.json"
"""The library in an adapter's folder."""

LARGEST_LIBRARY = 2**21
"""Bytes of the largest library that is read."""

MOST = 1000
"""Strategies of a library: each is compared with each."""

UNKNOWN = "unknown"
"""What a code beyond its strategy's radius is called; no strategy can have this name."""

MARGIN = 1e-4
"""Projected codes stay inside their region by this fraction of its size, so that float32 does not round them out."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Strategy(Checked):
    """A region of codes, and what it is for."""

    number: Count
    """From 1, by falling share; it stays when the name changes."""
    name: str
    """A person's word for it; "strategy-3" until somebody gives it one."""
    centroid: tuple[float, ...]
    """(n_z,): the middle of its codes."""
    radius: Positive
    """Distance from the centroid up to which a code is known."""
    share: Fraction
    """Of the codes that the library was made from."""
    examples: tuple[str, ...] = ()
    """What its codes wrote or did, the most typical first."""


@dataclass(frozen=True)
class Library(Checked):
    """Content of strategies.json: the strategies of an adapter. OptionError where they do not fit each other."""

    adapter: str
    """See `meaning_of`; the library is refused for other adapters."""
    source: str
    """Whose codes it was made from: "policy", "prior" or "demonstrations"."""
    codes: Count
    """How many."""
    silhouette: Annotated[float, Range(-1, 1)]
    """How well they fall apart: near 1 into clusters, near 0 not at all; strategies then merely tile the codes."""
    strategies: tuple[Strategy, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.strategies or len({len(strategy.centroid) for strategy in self.strategies}) > 1:
            raise OptionError("strategies", "must be one or more, with centroids of one size.")
        if not all(name.strip() and name != UNKNOWN for name in self.names):
            raise OptionError("strategies", f"must all have names, other than {UNKNOWN!r}, which other codes have.")
        for what, values in {"name": self.names, "number": [s.number for s in self.strategies]}.items():
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise OptionError("strategies", f"have the {what} {twice[0]!r} twice; give every strategy its own.")
        gaps = cdist(self.centroids, self.centroids) + np.diag([np.inf] * len(self.names))
        if not (gaps > 1e-3 * (1 + np.abs(self.centroids).max())).all():
            raise OptionError("strategies", "have centroids that are not finite or cannot be told apart.")

    # -- the person's side --------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(strategy.name for strategy in self.strategies)

    def renamed(self, number: int, name: str) -> Library:
        """The library with another name for strategy `number`; InternalRLError for a name that cannot be."""
        if number not in [strategy.number for strategy in self.strategies]:
            known = ", ".join(f"{strategy.number} ({strategy.name})" for strategy in self.strategies)
            raise InternalRLError(f"There is no strategy {number}; choose among {known}.")
        renamed = [
            dataclasses.replace(strategy, name=name) if strategy.number == number else strategy
            for strategy in self.strategies
        ]
        try:
            return dataclasses.replace(self, strategies=tuple(renamed))
        except OptionError as error:
            raise InternalRLError(f"Strategy {number} cannot be called {name!r}: {error}") from error

    def save(self, file: str | Path) -> None:
        """Write the library, whole or not at all; one that could not be read again is refused."""
        data = (json.dumps(to_dict(self), indent=2, allow_nan=False, ensure_ascii=False) + "\n").encode()
        if len(data) > LARGEST_LIBRARY:
            raise InternalRLError(f"{file} would have more than {LARGEST_LIBRARY:,} bytes; fit from shorter texts.")
        write_atomic(file, data)

    # -- geometry -----------------------------------------------------------------------------------------

    @cached_property
    def centroids(self) -> Array:
        """(K, n_z)."""
        return np.array([strategy.centroid for strategy in self.strategies], np.float64)

    @cached_property
    def radii(self) -> Array:
        """(K,)."""
        return np.array([strategy.radius for strategy in self.strategies], np.float64)

    @cached_property
    def cells(self) -> list[tuple[Array, Array]]:
        """Per strategy k its Voronoi cell, the x with n (x − c_k) ≤ b: unit normals n (K − 1, n_z) and b (K − 1,)."""
        cells = []
        for k, centroid in enumerate(self.centroids):
            apart = np.delete(self.centroids, k, 0) - centroid
            gap = np.linalg.norm(apart, axis=1)
            cells.append((apart / gap[:, None], gap / 2))
        return cells

    def nearest(self, codes: Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Of codes (R, n_z): the strategy with the nearest centroid (R,), as an index, and (R,) whether it is known."""
        distance = np.sqrt(((codes[:, None].astype(np.float64) - self.centroids) ** 2).sum(-1))
        index = distance.argmin(1)
        return index, distance[np.arange(len(codes)), index] <= self.radii[index]

    def project(self, code: Array, allowed: Sequence[int]) -> Array:
        """The point (n_z,) nearest to `code` in the region of one of the strategies `allowed` (indices, at least one).

        It lies inside the region by `MARGIN`: float32 can hold it without leaving.
        """
        code = code.astype(np.float64)
        gaps = {k: self._gap(code, k) for k in allowed}
        best, found = np.inf, code
        for k in sorted(gaps, key=gaps.__getitem__):
            if gaps[k] >= best:
                break
            point = self._nearest_in_region(code, k)
            if (distance := float(np.linalg.norm(point - code))) < best:
                best, found = distance, point
        return found

    def _gap(self, code: Array, k: int) -> float:
        """A lower bound of the distance from `code` to the region of strategy k."""
        (normals, bounds), offset = self.cells[k], code - self.centroids[k]
        return float(max(0.0, np.linalg.norm(offset) - self.radii[k], *(normals @ offset - bounds)))

    def _nearest_in_region(self, code: Array, k: int) -> Array:
        normals, bounds = self.cells[k][0], self.cells[k][1] * (1 - MARGIN)
        offset, radius = code - self.centroids[k], self.radii[k] * (1 - MARGIN)
        point = _onto_polyhedron(offset, normals, bounds)
        if np.linalg.norm(point) > radius:
            # The optimality conditions with the ball's: the polyhedron's point nearest to a t · offset, 0 < t < 1.
            def excess(t: float) -> float:
                return float(np.linalg.norm(_onto_polyhedron(t * offset, normals, bounds))) - radius

            point = _onto_polyhedron(brentq(excess, 0.0, 1.0, xtol=1e-12) * offset, normals, bounds)
        # What is left is rounding. The region is convex around its centroid, so a little towards it leads inside.
        over = max(float(np.linalg.norm(point)) / radius, *(normals @ point / bounds), 1.0)
        return self.centroids[k] + point / over


def _onto_polyhedron(point: Array, normals: Array, bounds: Array) -> Array:
    """The x nearest to `point` with normals · x ≤ bounds, where all bounds are positive, so that 0 is inside.

    Least distance programming by non-negative least squares (Lawson and Hanson, Solving Least Squares Problems, 23.4).
    """
    over = normals @ point - bounds
    if not len(over) or over.max() <= 0:
        return point
    scale = np.linalg.norm(point)  # the numbers of the problem are then near 1, however far away the point is
    system = np.vstack([-normals.T, over / scale])
    weights, _ = nnls(system, np.eye(len(system))[-1])
    rest = system @ weights - np.eye(len(system))[-1]
    return point - scale * rest[:-1] / rest[-1]


def load_library(file: str | Path, adapter: str | Path) -> Library:
    """The library in `file`, which must be one of the adapter in the folder `adapter`, or InternalRLError."""
    library = read_library(file)
    if library.adapter != (found := meaning_of(adapter)):
        raise InternalRLError(
            f"{file} is a library of the adapter {library.adapter[:16]}, but {adapter} is {found[:16]}: its codes mean "
            "something else; run `internalrl strategies fit` on it."
        )
    n_z = read_config(Path(adapter) / CONFIG_FILE).metacontroller.n_z
    if library.centroids.shape[1] != n_z:
        raise InternalRLError(f"{file} has centroids that are no codes of {n_z} numbers; restore it.")
    return library


def read_library(file: str | Path) -> Library:
    """The library in `file`, whatever adapter it is of; InternalRLError when it is missing or damaged."""
    try:
        values = json.loads(read_file(file, LARGEST_LIBRARY))
    except OSError as error:
        raise InternalRLError(
            f"{file} cannot be read ({error.strerror}); make a library with `internalrl strategies fit`."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InternalRLError(f"{file} is no JSON ({error}); restore it, or fit the strategies again.") from error
    if isinstance(values, dict) and len(values.get("strategies") or ()) > MOST:
        raise InternalRLError(f"{file} has more than {MOST} strategies; fit them again.")
    return from_dict(Library, values, where=str(file))


def meaning_of(adapter: str | Path) -> str:
    """SHA-256 of what the codes of the adapter in a folder mean: its base, its layer, its metacontroller.

    Not its policy: internal RL changes who chooses the codes, not what they do, and a library stays valid.
    """
    folder = Path(adapter)
    config = read_config(folder / CONFIG_FILE)
    sizes = json.dumps(to_dict(config.metacontroller), sort_keys=True)
    digest = hashlib.sha256(f"{config.method} {config.base_fingerprint} {sizes}".encode())
    for name, tensor in sorted(read_tensors(folder / TENSOR_FILE, config.tensors_sha256).items()):
        if name.startswith("metacontroller."):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()
