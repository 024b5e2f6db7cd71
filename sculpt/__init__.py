"""Sculpt: automatic pattern pruning of JAX networks.

The public names live here and load on first use, so that importing this package costs nothing and touches no device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sculpt import agents, data, export, latency, nets
    from sculpt.agents import AgentConfig, RewardConfig, SearchConfig, SearchResult, search, to_graph
    from sculpt.data import (
        Split,
        Splits,
        from_arrays,
        from_examples,
        from_sources,
        load_data,
        load_folder,
        load_parquet,
    )
    from sculpt.export import (
        export_litert,
        export_onnx,
        export_stablehlo,
        fold,
        load_model,
        load_params,
        load_stablehlo,
        save_model,
        save_params,
    )
    from sculpt.latency import (
        Latency,
        compare_latency,
        measure_group_overheads,
        measure_latency,
        measure_layers,
    )
    from sculpt.model import Model, from_function, from_linen, from_nnx
    from sculpt.pruning import (
        Cost,
        Space,
        apply_masks,
        check_budget,
        compact,
        compact_tree,
        cost,
        count_cost,
        lamp_policy,
        layer_macs,
        magnitude_policy,
        make_masks,
        make_space,
        masks_from_zeros,
        permute_channels,
        policy_from,
        random_policies,
        uniform_policy,
        with_resource,
    )
    from sculpt.pruning.importance import Importance, importance
    from sculpt.repair import recalibrate, reconstruct
    from sculpt.scoring import (
        EvaluationPlan,
        Race,
        Scores,
        StreamReport,
        Tuning,
        evaluate,
        evaluate_file,
        evaluate_policies,
        race_policies,
        tune_plan,
    )
    from sculpt.task import CLASSIFICATION, Task
    from sculpt.tracing import Trace, trace
    from sculpt.training import (
        FinetuneConfig,
        Recipe,
        TunedPolicies,
        finetune,
        finetune_policies,
        hold_zeros,
        recipe_for,
        train,
    )

__version__ = "0.1.0"

_HOMES = {
    "sculpt.agents": (
        "AgentConfig",
        "RewardConfig",
        "SearchConfig",
        "SearchResult",
        "search",
        "to_graph",
    ),
    "sculpt.data": (
        "Split",
        "Splits",
        "from_arrays",
        "from_examples",
        "from_sources",
        "load_data",
        "load_folder",
        "load_parquet",
    ),
    "sculpt.export": (
        "export_litert",
        "export_onnx",
        "export_stablehlo",
        "fold",
        "load_model",
        "load_params",
        "load_stablehlo",
        "save_model",
        "save_params",
    ),
    "sculpt.latency": (
        "Latency",
        "compare_latency",
        "measure_group_overheads",
        "measure_latency",
        "measure_layers",
    ),
    "sculpt.model": (
        "Model",
        "from_function",
        "from_linen",
        "from_nnx",
    ),
    "sculpt.pruning": (
        "Cost",
        "Space",
        "apply_masks",
        "check_budget",
        "compact",
        "compact_tree",
        "cost",
        "count_cost",
        "lamp_policy",
        "layer_macs",
        "magnitude_policy",
        "make_masks",
        "make_space",
        "masks_from_zeros",
        "permute_channels",
        "policy_from",
        "random_policies",
        "uniform_policy",
        "with_resource",
    ),
    "sculpt.pruning.importance": ("Importance", "importance"),
    "sculpt.repair": (
        "recalibrate",
        "reconstruct",
    ),
    "sculpt.scoring": (
        "EvaluationPlan",
        "Race",
        "Scores",
        "StreamReport",
        "Tuning",
        "evaluate",
        "evaluate_file",
        "evaluate_policies",
        "race_policies",
        "tune_plan",
    ),
    "sculpt.task": (
        "CLASSIFICATION",
        "Task",
    ),
    "sculpt.tracing": (
        "Trace",
        "trace",
    ),
    "sculpt.training": (
        "FinetuneConfig",
        "Recipe",
        "TunedPolicies",
        "finetune",
        "finetune_policies",
        "hold_zeros",
        "recipe_for",
        "train",
    ),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_SUBPACKAGES = (
    "agents",
    "data",
    "export",
    "latency",
    "nets",
    "pruning",
    "repair",
    "scoring",
    "tracing",
    "training",
)

__all__ = [
    "CLASSIFICATION",
    "AgentConfig",
    "Cost",
    "EvaluationPlan",
    "FinetuneConfig",
    "Importance",
    "Latency",
    "Model",
    "Race",
    "Recipe",
    "RewardConfig",
    "Scores",
    "SearchConfig",
    "SearchResult",
    "Space",
    "Split",
    "Splits",
    "StreamReport",
    "Task",
    "Trace",
    "TunedPolicies",
    "Tuning",
    "__version__",
    "agents",
    "apply_masks",
    "check_budget",
    "compact",
    "compact_tree",
    "compare_latency",
    "cost",
    "count_cost",
    "data",
    "evaluate",
    "evaluate_file",
    "evaluate_policies",
    "export",
    "export_litert",
    "export_onnx",
    "export_stablehlo",
    "finetune",
    "finetune_policies",
    "fold",
    "from_arrays",
    "from_examples",
    "from_function",
    "from_linen",
    "from_nnx",
    "from_sources",
    "hold_zeros",
    "importance",
    "lamp_policy",
    "latency",
    "layer_macs",
    "load_data",
    "load_folder",
    "load_model",
    "load_params",
    "load_parquet",
    "load_stablehlo",
    "magnitude_policy",
    "make_masks",
    "make_space",
    "masks_from_zeros",
    "measure_group_overheads",
    "measure_latency",
    "measure_layers",
    "nets",
    "permute_channels",
    "policy_from",
    "race_policies",
    "random_policies",
    "recalibrate",
    "recipe_for",
    "reconstruct",
    "save_model",
    "save_params",
    "search",
    "to_graph",
    "trace",
    "train",
    "tune_plan",
    "uniform_policy",
    "with_resource",
]


def __getattr__(name: str) -> Any:
    if name in _SUBPACKAGES:
        return importlib.import_module(f"sculpt.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'sculpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
