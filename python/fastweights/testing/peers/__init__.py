"""Rivals for the benchmark, one file each. Nothing is imported before it is timed."""
