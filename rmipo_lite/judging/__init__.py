"""Whether a model got better, as others say: judges, pairs of a benchmark, files for programs.

`judges` say whose answer is better and `judgement` what that is worth; `pair_accuracy` asks the
model of somebody's pairs; `answers_file` writes what benchmarks with judges of their own read.
"""

__all__ = ["answers_file", "judgement", "judges", "pair_accuracy"]
