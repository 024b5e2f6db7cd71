"""The budget of a run: its resource, the accuracy of its prediction, and the share kept in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sculpt.environment import cores
from sculpt.latency.layer_latency import LayerLatency
from sculpt.latency.measurement import compare_latency

if TYPE_CHECKING:
    from sculpt.pipeline.stages import Pipeline

_TRUSTED_ERROR = 0.2
"""Predictions of latency that are off by more, in the median, are warned of."""


def about_latency(latency: LayerLatency) -> dict[str, Any]:
    """What a record says of the latency that a budget was of."""
    return {
        "engine": latency.engine,
        "batch": latency.batch,
        "threads": latency.threads,
        "device": latency.device,
        "networks": len(latency.error),
        "median_error": float(np.median(latency.error)),
        "largest_error": float(latency.error.max()),
    }


def latency_note(told: Mapping[str, Any]) -> str:
    """How far the predictions of latency were off, and what to do where that is too far."""
    note = (
        "latency in {engine} at batch {batch}, threads: {threads}: {networks} whole networks predicted from their layers with an error of "
        "{median_error:.1%} in the median, {largest_error:.1%} at the most"
    ).format(**told)
    if told["median_error"] <= _TRUSTED_ERROR:
        return note
    return f"{note}. A budget of such predictions says little: leave the machine to the measurement (or --latency-all-sizes), in another --run"


def kept_of_budget(p: Pipeline, dense: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """What was asked for, and what it has become: shares of the dense network's."""
    settings, found = p.search_settings, p.run.record("search")
    kept = {
        "macs": small["macs_theoretical"] / dense["macs_theoretical"],
        "macs_realised": small["macs_realised"] / dense["macs_realised"],
        "params": small["params"] / dense["params"],
    }
    about = found.get("latency")
    if about is not None:
        times = compare_latency(
            {"dense": p.dense, "compact": p.small},
            p.noise(about["batch"]),
            engine=about["engine"],
            threads=min(about["threads"], cores()),
        )
        kept["latency"] = times["compact"].median / times["dense"].median
    return {
        "asked": settings.budget,
        "resource": list(settings.resource),
        "predicted": found["used"],
        "kept": kept,
        "latency": about,
    }


def budget_sentence(budget: Mapping[str, Any] | None) -> str:
    """What the budget was, and what of it is kept after all; nothing for a run that did not note it."""
    if budget is None:
        return ""
    about = budget["latency"]
    names = {"macs": "MACs", "macs_realised": "realised MACs", "params": "parameters"}
    if about is not None:
        names["latency"] = f"latency in {about['engine']} at batch {about['batch']}"
    # The MACs that stay are told beside what the budget was of: zeros in place, and groups of filters, keep more of them.
    asked = dict.fromkeys([*budget["resource"], "macs", "macs_realised"])
    kept = ", ".join(f"{budget['kept'][name]:.3f} of the {names[name]}" for name in asked)
    limited = " and ".join(names[name] for name in budget["resource"])
    return f" Budget {budget['asked']:g} of {limited}, {budget['predicted']:.3f} by the search; kept: {kept}."
