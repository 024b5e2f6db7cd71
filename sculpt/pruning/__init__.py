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
from sculpt.pruning.compaction.compactor import compact
from sculpt.pruning.compaction.trees import compact_tree
from sculpt.pruning.costs import Cost, cost, count_cost, layer_macs, resource_used
from sculpt.pruning.existing_zeros import masks_from_zeros
from sculpt.pruning.families.family import Family, Option, Site
from sculpt.pruning.families.patterns import FAMILIES
from sculpt.pruning.families.sparse import is_nm
from sculpt.pruning.masks import apply_masks, make_masks, mask_params
from sculpt.pruning.named_policy import policy_from
from sculpt.pruning.permutation import permute_channels
from sculpt.pruning.resources import Lookup, Resource
from sculpt.pruning.space import Space, make_choices, make_space, with_resource

__all__ = [
    "FAMILIES",
    "Cost",
    "Family",
    "Lookup",
    "Option",
    "Projection",
    "Resource",
    "Site",
    "Space",
    "apply_masks",
    "check_budget",
    "compact",
    "compact_tree",
    "cost",
    "count_cost",
    "energy_logits",
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
    "uniform_policy",
    "with_resource",
]
