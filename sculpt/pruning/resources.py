"""Resources that a budget limits: multiply-accumulates, parameters, measured latency, or several at once.

A resource says what share of the dense network's a policy uses, in closed form: nothing is run. Its functions take policies as
NumPy arrays too, and then compute on the host.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from sculpt.pruning.space import Space


class Resource(abc.ABC):
    """Something of which a policy uses a share."""

    name: str
    """In words, for messages and plots: "MACs"."""

    @abc.abstractmethod
    def used(self, space: Space, policies: Any) -> Any:
        """float32 `[...]`: what policies int32 `[..., sites]` use / what the dense network does; a budget limits it."""

    def priced(self, space: Space, policies: Any) -> Any:
        """float32 `[...]`: what the budget projection puts its price on: `used`, unless that does not fall wherever some part of it
        does."""
        return self.used(space, policies)


def kept_fractions(space: Space, policies: Any) -> Any:
    """Kept fraction of every atom, float32 `[..., atoms + 1]`; the last one is 1."""
    columns = np.arange(len(space.atoms) + 1, dtype=np.int32)
    # The last row is 1 under every option of whatever site.
    sites = np.append(space.atom_site, np.int32(0))
    return _module_of(policies).asarray(space.fractions)[columns, policies[..., sites]]


def kept_units(space: Space, policies: np.ndarray) -> np.ndarray:
    """Kept units of every atom, int64 `[..., atoms + 1]`; the last one is 1."""
    sites = np.append(space.atom_site, np.int32(0))
    return space.counts[np.arange(len(space.atoms) + 1), policies[..., sites]]


@dataclasses.dataclass(frozen=True, eq=False)
class Polynomial:
    """A count as a sum of products of kept units: `sum_m coefficient[m] * prod_d kept[atoms[m, d]]`, times the kept share of the
    kernel's entries `entries[m]` where these are chosen one by one."""

    coefficient: np.ndarray
    """int64 `[monomials]`."""
    atoms: np.ndarray
    """int32 `[monomials, degree]`: columns of the space's atoms, padded with the column that is always 1."""
    entries: np.ndarray
    """int32 `[monomials]`: the column of the kernel's entries; the column that is always 1 where there is none."""
    sizes: np.ndarray
    """int64 `[atoms + 1]`: units of every atom; the last 1."""
    owner: np.ndarray
    """int32 `[monomials]`: layer or leaf that the monomial belongs to."""

    @functools.cached_property
    def dense(self) -> np.ndarray:
        """int64 `[monomials]`: the values when everything is kept."""
        return self.coefficient * self.sizes[self.atoms].prod(axis=1)

    @property
    def total(self) -> int:
        """Its value when everything is kept."""
        return int(self.dense.sum())

    @functools.cached_property
    def share(self) -> np.ndarray:
        """float32 `[monomials]`: part of the dense total; sums to one."""
        return (self.dense / max(self.total, 1)).astype(np.float32)

    def evaluate(self, kept: Any) -> Any:
        """float32 `[...]`: its value / `total`, from kept fractions `[..., atoms + 1]`; for compiled code."""
        return kept[..., np.column_stack([self.atoms, self.entries])].prod(axis=-1) @ self.share

    def count(self, kept: np.ndarray) -> np.ndarray:
        """int64 `[..., monomials]`: the exact values, from kept units int64 `[..., atoms + 1]`. A kernel's share of entries that is no
        whole number is rounded."""
        value = self.coefficient
        for column in self.atoms.T:
            value = value * kept[..., column]
        whole, rest = np.divmod(value, size := self.sizes[self.entries])
        entries = kept[..., self.entries]
        return whole * entries + (2 * rest * entries + size) // (2 * size)

    def realised(self, compacts: np.ndarray) -> Polynomial:
        """What of it is left after compaction; `compacts` is bool `[atoms + 1]`, as in `Space`."""
        last = len(compacts) - 1
        stays = np.where(compacts[self.atoms], 1, self.sizes[self.atoms]).prod(axis=1)
        return dataclasses.replace(
            self,
            coefficient=self.coefficient * stays,
            atoms=np.where(compacts[self.atoms], self.atoms, last),
            entries=np.where(compacts[self.entries], self.entries, last),
        )


@dataclasses.dataclass(frozen=True)
class Counted(Resource):
    """What can be counted: MACs or parameters."""

    name: str
    polynomial: Polynomial

    def used(self, space: Space, policies: Any) -> Any:
        return self.polynomial.evaluate(kept_fractions(space, policies))


@dataclasses.dataclass(frozen=True, eq=False)
class Lookup(Resource):
    """What was measured part by part: a part depends on the options of a few sites, and its amount is looked up.

    The amount of part p under a policy is `values[start[p] + sum_d steps[p, d, policy[sites[p, d]]]]`.
    """

    name: str
    total: float
    """What the dense network uses: seconds, for latency."""
    fixed: float
    """Share of `total` that no choice changes."""
    sites: np.ndarray
    """int32 `[parts, degree]`: sites that the part depends on, padded with 0."""
    steps: np.ndarray
    """int32 `[parts, degree, max_options]`: 0 where padded."""
    start: np.ndarray
    """int32 `[parts]`."""
    values: np.ndarray
    """float32 `[entries]`: shares of `total`."""
    num_options: np.ndarray
    """int32: the options of every site of the space that this is for."""

    def used(self, space: Space, policies: Any) -> Any:
        module = _module_of(policies)
        chosen = policies[..., self.sites]
        first = np.arange(self.sites.size, dtype=np.int32).reshape(self.sites.shape) * self.steps.shape[-1]
        steps = module.asarray(self.steps.reshape(-1))[chosen + module.broadcast_to(first, chosen.shape)]
        steps = steps.sum(axis=-1, dtype=np.int32)
        place = steps + module.broadcast_to(self.start, steps.shape)
        return module.asarray(self.values)[place].sum(axis=-1) + np.float32(self.fixed)


@dataclasses.dataclass(frozen=True, eq=False)
class Several(Resource):
    """The one of several resources that is used most, each measured by its allowance."""

    parts: tuple[Resource, ...]
    allowances: tuple[float, ...]
    """How much more than the budget each may use: with 1.5 a budget of 0.5 allows 0.75. The smallest is 1."""

    @property
    def name(self) -> str:  # type: ignore[override]
        named = (
            part.name if allowance == 1.0 else f"{part.name} / {allowance:g}"
            for part, allowance in zip(self.parts, self.allowances)
        )
        return f"the largest of {', '.join(named)}"

    def _shares(self, space: Space, policies: Any) -> list[Any]:
        return [
            part.used(space, policies) / np.float32(allowance)
            for part, allowance in zip(self.parts, self.allowances)
        ]

    def used(self, space: Space, policies: Any) -> Any:
        return functools.reduce(_module_of(policies).maximum, self._shares(space, policies))

    def priced(self, space: Space, policies: Any) -> Any:
        # The largest alone would not tell what the others are relieved by.
        return sum(self._shares(space, policies)) / np.float32(len(self.parts))


def _module_of(policies: Any) -> Any:
    """What computes with the policies: NumPy on the host, or JAX."""
    return np if isinstance(policies, np.ndarray) else jnp
