"""What is connected to what: from a JAX function to layers, coupled axes and data-flow edges."""

from sculpt.tracing.layers import Layer, Leaf, Product
from sculpt.tracing.tracer import Frozen, Group, Trace, trace

__all__ = [
    "Frozen",
    "Group",
    "Layer",
    "Leaf",
    "Product",
    "Trace",
    "trace",
]
