"""What can go, what it costs, and taking it out."""

from sculpt.pruning.budget import (
    Projection,
    check_budget,
    energy_logits,
    lamp_policy,
    magnitude_policy,
    project,
    random_policies,
    uniform_policy,
)
from sculpt.pruning.compact import compact
from sculpt.pruning.compacted_trees import compact_tree
from sculpt.pruning.cost import Cost, cost, count_cost, layer_macs, resource_used
from sculpt.pruning.existing_zeros import masks_from_zeros
from sculpt.pruning.family import Family, Option, Site
from sculpt.pruning.features import SiteFeatures, site_features, to_graph
from sculpt.pruning.importance import KINDS, Importance, importance
from sculpt.pruning.masks import apply_masks, make_masks, mask_params
from sculpt.pruning.named_policy import policy_from
from sculpt.pruning.patterns import FAMILIES
from sculpt.pruning.permutation import permute_channels
from sculpt.pruning.resources import Lookup, Resource
from sculpt.pruning.space import Space, make_choices, make_space, with_resource
from sculpt.pruning.sparse import is_nm

__all__ = [
    "FAMILIES",
    "KINDS",
    "Cost",
    "Family",
    "Importance",
    "Lookup",
    "Option",
    "Projection",
    "Resource",
    "Site",
    "SiteFeatures",
    "Space",
    "apply_masks",
    "check_budget",
    "compact",
    "compact_tree",
    "cost",
    "count_cost",
    "energy_logits",
    "importance",
    "is_nm",
    "lamp_policy",
    "layer_macs",
    "magnitude_policy",
    "make_choices",
    "make_masks",
    "make_space",
    "mask_params",
    "masks_from_zeros",
    "permute_channels",
    "policy_from",
    "project",
    "random_policies",
    "resource_used",
    "site_features",
    "to_graph",
    "uniform_policy",
    "with_resource",
]
