"""Folding: scales, shifts and dead branches become part of the kernels beside them."""
