"""Benchmarks of a GPU need torch and numba-cuda; `python bench/run_on_gpu.py` runs them, not pytest."""

from __future__ import annotations

collect_ignore_glob = ["gpu_*.py", "torch_em.py"]
