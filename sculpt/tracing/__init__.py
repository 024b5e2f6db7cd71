"""What is connected to what: from a JAX function to layers, coupled axes and data-flow edges."""

from sculpt.tracing.trace import Frozen, Group, Layer, Leaf, Trace, trace

__all__ = ["Frozen", "Group", "Layer", "Leaf", "Trace", "trace"]
