"""Benchmarks: ``make bench`` writes RESULTS.md, ``python -m pytest bench --benchmark-enable`` tracks single figures.

Both call the same measurements. Each topic has a module with its cases, its targets and its tables; report.py puts them
together. Nothing here is installed.
"""
