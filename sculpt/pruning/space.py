"""The search space: sites times patterns. A policy is one option index per site, int32 `[sites]`; 0 keeps everything."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sculpt.arguments import checked, did_you_mean, is_real, is_whole
from sculpt.pruning.families.family import Choice, Limits, Option, Site
from sculpt.pruning.families.patterns import FAMILIES, ROUND_TO
from sculpt.pruning.importance.scores import Importance, check_importance
from sculpt.pruning.importance.units import fitting_leaves
from sculpt.pruning.layer_names import kept_out, nearest, sites_named
from sculpt.pruning.resources import Counted, Lookup, Polynomial, Resource, Several
from sculpt.tracing.axes import Atom
from sculpt.tracing.layers import Monomials
from sculpt.tracing.tracer import Trace


@dataclasses.dataclass(frozen=True, eq=False)
class Space:
    """All choices for one trace. Compares and hashes by identity: jitted code takes it as a static argument. A copy is the space itself; it
    can be pickled where its trace can."""

    trace: Trace
    families: tuple[str, ...]
    sites: tuple[Site, ...]
    atoms: tuple[Atom, ...]
    """The atoms that options act on, those that stand for the entries of a kernel included; each belongs to one site."""
    counts: np.ndarray
    """int64 `[atoms + 1, max_options]`: units of the atom kept under each option of its site; last row 1."""
    compacts: np.ndarray
    """bool `[atoms + 1]`: whether compaction removes what is not kept."""
    atom_site: np.ndarray
    """int32 `[atoms]`."""
    num_options: np.ndarray
    """int32 `[sites]`."""
    macs: Polynomial
    params: Polynomial
    resource: Resource
    """What a budget is a share of: MACs, but for `with_resource`."""
    option_cost: np.ndarray
    """float32 `[sites, max_options]`: what of the resource is used / dense if this site alone takes that option; 1 where invalid."""
    reachable: tuple[float, float]
    """Smallest and largest share of the resource that a projected policy uses."""
    site_nodes: np.ndarray
    """int32 `[sites]`: node of the graph that each site belongs to."""
    importance: Importance | None
    """What channels are ranked by; None for the energy of the parameters that masks are made of."""
    excluded: tuple[Site, ...]
    """The sites that there would be without what the user excludes."""

    def __copy__(self) -> Space:
        return self

    def __deepcopy__(self, _: Any) -> Space:
        return self

    def __repr__(self) -> str:
        return f"Space({self.num_sites} sites of {', '.join(self.families)}, in {self.trace})"

    @property
    def num_sites(self) -> int:
        return len(self.sites)

    @property
    def max_options(self) -> int:
        return max(len(site.options) for site in self.sites)

    @property
    def valid(self) -> np.ndarray:
        """bool `[sites, max_options]`: which option indices exist."""
        return np.arange(self.max_options)[None, :] < self.num_options[:, None]

    @functools.cached_property
    def fractions(self) -> np.ndarray:
        """float32 `[atoms + 1, max_options]`: `counts` as shares of all units."""
        return (self.counts / self.counts[:, :1]).astype(np.float32)

    @property
    def kept(self) -> np.ndarray:
        """float32 `[sites, max_options]`: fraction of the site's units kept; 0 where invalid."""
        table = np.zeros((self.num_sites, self.max_options), np.float32)
        for site in self.sites:
            table[site.index, : len(site.options)] = [o.kept for o in site.options]
        return table

    def describe(self, policy: Any) -> list[str]:
        """One line per site: its name, family and the chosen option; then what is excluded."""
        choices = np.asarray(policy)
        return [
            *(f"{s.name} {s.family} {s.options[int(choices[s.index])].label}" for s in self.sites),
            *(f"{s.name} {s.family} excluded by you" for s in self.excluded),
        ]


@checked
def make_space(
    trace: Trace,
    families: Sequence[str] = ("channels", "rect"),
    round_to: int | str = 1,
    min_keep: int = 1,
    importance: Importance | None = None,
    *,
    exclude: Sequence[str] = (),
    levels: int | str = 8,
    keep_at_least: Mapping[str, float] | None = None,
) -> Space:
    """Lists the sites of a traced network and the options of each.

    Args:
      trace: what `sculpt.trace` returned.
      families: names of pattern families (`FAMILIES`), or one name. `channels` can be combined with one kernel pattern per kernel. If
        several patterns apply, the first in the list wins.
      round_to: pruned widths are multiples of it in every array. It counts columns: all columns of the kept heads, not the heads. Or
        a device with a usual multiple: "cpu" (8), "gpu" (8), "tpu" (128).
      min_keep: least number of columns of a group that stay in every array, rounded up to a multiple of `round_to`. Groups of at most
        that size stay whole. With 0, a residual branch can be removed completely, because the skip connection bypasses it.
      importance: what `sculpt.importance` returned for this trace: the channels of lowest score go first, also after
        fine-tuning. None ranks them by retained energy on the parameters that masks are made of.
      exclude: layers and arrays that stay as they are: paths of the parameter tree or patterns, such as `("head", "Conv_0",
        "*/attention/*")`. No axis that one of them has is pruned anywhere. "head:inputs" or "head:outputs" keeps one side alone.
      levels: keep fractions of `channels` are multiples of one over it; "all": every number of units is an option, which is meant for
        `policy_from`: a search over so many is slow.
      keep_at_least: name of a site or layer, or pattern -> the share of it that has to stay, in (0, 1]: `{"stage3*": 0.5}`.

    Raises:
      ValueError: for an unknown family, a number out of range, a name that the network does not have, importance of another trace, or
        a network without any site.
    """
    families = (families,) if isinstance(families, str) else tuple(families)
    for name in families:
        if name not in FAMILIES:
            hint = did_you_mean(name, FAMILIES)
            raise ValueError(f"unknown pattern family {name!r}, expected one of {sorted(FAMILIES)}{hint}")
    if not families or len(set(families)) != len(families):
        raise ValueError(f"families must be distinct names out of {sorted(FAMILIES)}, got {families}")
    if isinstance(round_to, str):
        if round_to not in ROUND_TO:
            raise ValueError(
                f"round_to must be a whole number or one of {', '.join(ROUND_TO)}, got {round_to!r}{did_you_mean(round_to, ROUND_TO)}"
            )
        round_to = ROUND_TO[round_to]
    for name, number, lowest in (("round_to", round_to, 1), ("min_keep", min_keep, 0)):
        if not is_whole(number, lowest):
            raise ValueError(f"{name} must be a whole number of at least {lowest}, got {number!r}")
    if importance is not None:
        check_importance(trace, importance)
    if levels != "all" and not is_whole(levels, 2):
        raise ValueError(f'levels must be a whole number of at least 2, or "all", got {levels!r}')
    atoms_out, leaves_out = kept_out(trace, (exclude,) if isinstance(exclude, str) else tuple(exclude))
    limits = Limits(int(round_to), int(min_keep), levels, atoms_out, leaves_out)
    found = _sites(trace, families, limits)
    everything = _sites(trace, families, Limits(limits.round_to, limits.min_keep, levels)) if exclude else []
    excluded = tuple(site for site in everything if not atoms_out.isdisjoint(site.atoms))
    found = _bounded(trace, found, keep_at_least or {})
    if not found:
        if excluded or keep_at_least:
            raise ValueError(
                f"nothing to prune with families {families}: all sites are excluded by you, or kept by keep_at_least"
            )
        if "channels" in families and trace.groups:
            largest = max(group.size for group in trace.groups)
            raise ValueError(
                f"nothing to prune with families {families}: round_to {round_to} and min_keep {min_keep} leave every group "
                f"whole, the largest has {largest} units; lower them"
            )
        if not {"channels", "rect"} & set(families):
            raise ValueError(
                f"nothing to prune with families {families}: no kernel of this network has a size that they take; see the table of "
                "families in the README"
            )
        reasons = sorted({f.reason for f in trace.frozen})[:3]
        raise ValueError(
            f"nothing to prune with families {families}: every axis is frozen ({'; '.join(reasons)})"
        )
    sites = tuple(dataclasses.replace(site, index=i) for i, site in enumerate(found))

    from sculpt.tracing.graph import group_node, layer_node

    atoms = tuple(atom for site in sites for atom in site.atoms)
    column = {atom: i for i, atom in enumerate(atoms)}
    options = max(len(site.options) for site in sites)
    counts = np.ones((len(atoms) + 1, options), np.int64)
    for site in sites:
        for position, (atom, size) in enumerate(zip(site.atoms, site.sizes)):
            counts[column[atom]] = size
            counts[column[atom], : len(site.options)] = [option.counts[position] for option in site.options]
    atom_site = np.asarray([site.index for site in sites for _ in site.atoms], np.int32)
    compacts = np.asarray([FAMILIES[sites[s].family].compacts for s in atom_site] + [True])
    entries = {site.kernel.leaf: site.kernel.atom for site in sites if site.kernel is not None}
    layers = [_times(layer.monomials, entries.get(layer.leaf)) for layer in trace.layers]
    sizes = counts[:, 0]
    macs = _polynomial(trace, [*layers, *(p.monomials for p in trace.products)], column, sizes)
    params = _polynomial(
        trace, [_times(m, entries.get(leaf)) for leaf, m in enumerate(trace.leaf_monomials)], column, sizes
    )
    num_options = np.asarray([len(site.options) for site in sites], np.int32)
    site_nodes = np.asarray(
        [(group_node if s.family == "channels" else layer_node)(trace, s.owner) for s in sites], np.int32
    )
    space = Space(
        trace, families, sites, atoms, counts, compacts, atom_site, num_options, macs, params,
        Counted("MACs", macs), np.ones((len(sites), options), np.float32), (1.0, 1.0), site_nodes, importance,
        excluded,
    )  # fmt: skip
    return _limited(space, space.resource)


@checked
def with_resource(
    space: Space, resource: str | Resource | Sequence[str | Resource] | Mapping[str | Resource, float]
) -> Space:
    """The same space with budgets of something else than MACs; the space itself, where they are of "macs" or "params" and asked for again,
    or of that very `Resource`.

    Args:
      space: the space.
      resource: "macs", "macs_realised" (after compaction), "params" (likewise), or a latency from `sculpt.measure_layers`. A sequence of
        these: a policy must keep the budget of every one. A mapping: each may use so many times the budget; `{"macs": 1.0, "params":
        1.5}` with a budget of 0.5 allows 0.5 of the MACs and 0.75 of the parameters.

    Raises:
      ValueError: for an unknown name, none at all, or allowances of which the smallest is not 1.
    """
    found = _resource(space, resource)
    # Compiled code is kept by the identity of the space.
    return space if found == space.resource else _limited(space, found)


def _limited(space: Space, resource: Resource) -> Space:
    """The space with what follows from its resource."""
    single = np.zeros((space.num_sites, space.max_options, space.num_sites), np.int32)
    for site in space.sites:
        single[site.index, : len(site.options), site.index] = np.arange(len(site.options))
    option_cost = np.asarray(resource.priced(space, single), np.float32)
    cheapest = np.where(space.valid, option_cost, np.inf).argmin(axis=1).astype(np.int32)
    lowest = float(resource.used(space, cheapest))
    return dataclasses.replace(space, resource=resource, option_cost=option_cost, reachable=(lowest, 1.0))


def _resource(space: Space, given: Any) -> Resource:
    counted = {
        "macs": lambda: Counted("MACs", space.macs),
        "macs_realised": lambda: Counted("realised MACs", space.macs.realised(space.compacts)),
        # Zeros that stay in place take as much room as other weights.
        "params": lambda: Counted(
            "parameters", space.params if space.compacts.all() else space.params.realised(space.compacts)
        ),
    }
    if isinstance(given, str):
        if given not in counted:
            raise ValueError(
                f"unknown resource {given!r}, expected {', '.join(counted)} or a latency from sculpt.measure_layers"
                f"{did_you_mean(given, counted)}"
            )
        return counted[given]()
    if isinstance(given, Mapping | Sequence):
        shares = given if isinstance(given, Mapping) else dict.fromkeys(given, 1.0)
        allowances = tuple(shares.values())
        if not all(map(is_real, allowances)) or min(allowances, default=0.0) != 1.0:
            raise ValueError(
                f"expected one resource or more, the smallest of whose allowances is 1, got {dict(shares)}"
            )
        return Several(tuple(_resource(space, name) for name in shares), tuple(map(float, allowances)))
    if not isinstance(given, Lookup):
        if isinstance(getattr(given, "resource", None), Resource):
            raise ValueError(f"expected a resource, got {type(given).__name__}: give its .resource")
        raise ValueError(
            f"expected a resource by name or from sculpt.measure_layers, got {type(given).__name__}"
        )
    if not np.array_equal(given.num_options, space.num_options):
        raise ValueError(
            f"the {given.name} was measured for a space of {len(given.num_options)} sites, this one has {space.num_sites} or other "
            "options: measure it for this one"
        )
    return given


def _sites(trace: Trace, families: Sequence[str], limits: Limits) -> list[Site]:
    """The sites of the families, without those that are kept out."""
    sites = [site for name in families for site in FAMILIES[name].sites(trace, limits)]
    return [site for site in _one_of_each_kernel(trace, sites) if limits.kept_out.isdisjoint(site.atoms)]


def _bounded(trace: Trace, sites: Sequence[Site], bounds: Mapping[str, float]) -> list[Site]:
    """The sites without the options that keep less than a bound allows, and without those that have one option left."""
    least: dict[int, float] = {}
    for pattern, share in bounds.items():
        if not is_real(share) or not 0 < share <= 1:
            raise ValueError(f"keep_at_least[{pattern!r}] must be a share in (0, 1], got {share!r}")
        named = sites_named(trace, sites, pattern)
        if not named:
            raise ValueError(
                f"keep_at_least names no site: {pattern!r}{nearest(pattern, (site.name for site in sites))}"
            )
        for site in named:
            least[id(site)] = max(share, least.get(id(site), 0.0))
    bounded = [
        dataclasses.replace(
            site, options=tuple(o for o in site.options if o.kept >= least.get(id(site), 0.0) - 1e-9)
        )
        for site in sites
    ]
    return [site for site in bounded if len(site.options) > 1]


def _one_of_each_kernel(trace: Trace, sites: Sequence[Site]) -> list[Site]:
    """The sites without those of a kernel that an earlier family has; groups of channels are no kernels."""
    taken: dict[int, str] = {}
    return [
        site
        for site in sites
        if site.family == "channels"
        or taken.setdefault(trace.layers[site.owner].leaf, site.family) == site.family
    ]


def _times(monomials: Monomials, atom: Atom | None) -> Monomials:
    """A polynomial times the fraction of a kernel's entries that stay, if they are chosen one by one."""
    return monomials if atom is None else tuple((c, (*atoms, atom)) for c, atoms in monomials)


def _polynomial(
    trace: Trace, owners: Sequence[Monomials], column: dict[Atom, int], sizes: np.ndarray
) -> Polynomial:
    last = len(column)
    rows: dict[tuple[int, tuple[int, ...], int], int] = {}
    for owner, monomials in enumerate(owners):
        for coefficient, atoms in monomials:
            chosen, entries = [], last
            for atom in atoms:
                if atom < 0:  # the entries of a kernel
                    entries = column[atom]
                elif atom in column:
                    chosen.append(column[atom])
                else:
                    coefficient *= trace.axes.atom_size(atom)
            key = (owner, tuple(sorted(chosen)), entries)
            rows[key] = rows.get(key, 0) + coefficient
    degree = max((len(columns) for _, columns, _ in rows), default=0) or 1
    table = np.full((len(rows), degree), last, np.int32)
    for row, (_, columns, _) in enumerate(rows):
        table[row, : len(columns)] = columns
    return Polynomial(
        coefficient=np.asarray(list(rows.values()), np.int64),
        atoms=table,
        entries=np.asarray([entries for _, _, entries in rows], np.int32),
        sizes=sizes,
        owner=np.asarray([owner for owner, _, _ in rows], np.int32),
    )


def make_choices(space: Space, params: object) -> tuple[Choice, ...]:
    """Works out, for every site, which units each option keeps on these parameters.

    Computed once per network, then policies are applied by indexing. Compiled part by part, once for kernels of one shape and sites of the
    same options; inside `jit`, where it may stand too, all of it is compiled with the rest. Channels are ranked by `space.importance`,
    whatever the parameters, or without it by the energy of these parameters; windows and entries always by energy.

    Raises:
      ValueError: if the parameters are not of the traced network.
    """
    leaves = fitting_leaves(space.trace, params)
    scores = [FAMILIES[s.family].score(space.trace, s, leaves, space.importance) for s in space.sites]
    alike: dict[Any, list[Site]] = {}
    for site in space.sites:
        alike.setdefault((site.family, scores[site.index].shape, site.options), []).append(site)
    choices: dict[int, Choice] = {}
    for (name, _, options), sites in alike.items():
        together = _choose(name, options, [scores[site.index] for site in sites])
        for row, site in enumerate(sites):
            choice = _row(together, np.int32(row))
            if site.kernel is not None:
                choice = dataclasses.replace(choice, entries=site.kernel.restore(choice.entries))
            choices[site.index] = choice
    return tuple(choices[site.index] for site in space.sites)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _choose(family: str, options: tuple[Option, ...], scores: list[jax.Array]) -> Choice:
    """The choices of sites of the same options, stacked."""
    return jax.vmap(functools.partial(FAMILIES[family].choose, options))(jnp.stack(scores))


@jax.jit
def _row(together: Choice, row: jax.Array) -> Choice:
    return jax.tree.map(lambda leaf: leaf[row], together)


def retained_shares(space: Space, choices: Sequence[Choice]) -> jax.Array:
    """float32 `[sites, max_options]`: what each option retains (`Choice.retained`); 0 where there is no option."""
    return _padded([choice.retained for choice in choices], space.max_options)


@functools.partial(jax.jit, static_argnums=1)
def _padded(rows: list[jax.Array], length: int) -> jax.Array:
    return jnp.stack([jnp.pad(row, (0, length - len(row))) for row in rows])
