"""Benchmarks: each module is a command; see docs/performance.md."""
