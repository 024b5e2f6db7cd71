"""Measured latency: whole networks in their engines, and layers one by one."""

from sculpt.latency.group_overheads import measure_group_overheads
from sculpt.latency.layer_latency import LayerLatency, load_layers, measure_layers, save_layers
from sculpt.latency.measurement import Latency, compare_latency, measure_latency

__all__ = [
    "Latency",
    "LayerLatency",
    "compare_latency",
    "load_layers",
    "measure_group_overheads",
    "measure_latency",
    "measure_layers",
    "save_layers",
]
