"""Compaction: from masks to smaller arrays and operations with the same outputs."""
