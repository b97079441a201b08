"""Benchmarks: ``make bench`` writes RESULTS.md, ``python -m pytest bench --benchmark-enable`` tracks single figures.

Both call the measurements in em_iteration.py, initialization.py, memory.py and startup.py. Nothing here is installed.
"""
