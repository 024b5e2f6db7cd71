"""Policies from the names of sites: `policy_from`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sculpt.arguments import checked, is_real, is_whole
from sculpt.pruning.families.family import Site
from sculpt.pruning.layer_names import nearest, sites_named
from sculpt.pruning.space import Space


@checked
def policy_from(space: Space, kept: Mapping[str, Any]) -> np.ndarray:
    """int32 `[sites]`: a policy of one's own, such as one that another tool found; what is not named stays dense.

    Args:
      space: the search space.
      kept: name of a site (`space.describe` lists them), of a layer or array, or a pattern such as "stage3*" -> what stays there: a
        share, a float in [0, 1], of which the nearest option is taken; or a number of units, an int, which must be an option
        (`make_space(..., levels="all")` offers every number). Where a name has sites of several families, `channels` is meant. Of
        names that meet at a site the last one counts.

    Raises:
      ValueError: for a name without a site, or a number that is no option.
    """
    policy = np.zeros(space.num_sites, np.int32)
    for name, value in kept.items():
        sites = sites_named(space.trace, space.sites, str(name))
        if not sites:
            if sites_named(space.trace, space.excluded, str(name)):
                raise ValueError(f"policy_from names {name!r}, which is excluded by you: leave it out")
            raise ValueError(
                f"policy_from names no site: {name!r}{nearest(str(name), (site.name for site in space.sites))}"
            )
        channels = [site for site in sites if site.family == "channels"]
        for site in channels or sites:
            policy[site.index] = _option(site, value)
    return policy


def _option(site: Site, value: Any) -> int:
    """Which option keeps so much."""
    if is_whole(value, 0):
        counts = [int(np.prod(option.counts)) for option in site.options]
        if int(value) not in counts:
            raise ValueError(
                f"{site.name} can keep {', '.join(map(str, counts))} units, got {value}: give one of these or a share, or make the "
                'space with levels="all"'
            )
        return counts.index(int(value))
    if not is_real(value) or not 0 <= value <= 1:
        raise ValueError(
            f"expected for {site.name} a share in [0, 1] or a whole number of units, got {value!r}"
        )
    return int(np.argmin([abs(option.kept - float(value)) for option in site.options]))
