"""Whole-system benchmarks. Ratios taken in one interleaved run count; absolute figures are of one machine."""
