"""Results files as tables, plots, verdicts on the goals, and one page: ``python -m popsd_benchmarks.report``."""
