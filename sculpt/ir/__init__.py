"""Flat programs: one representation of what a network computes, which every pass reads, runs and rewrites."""
