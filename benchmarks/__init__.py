"""Benchmarks: `rmipo-lite bench {head,step,memory,data,report}`. Rows go to `benchmarks/*.csv`."""
