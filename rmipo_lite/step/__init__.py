"""One optimizer step: from pairs to the gradient of their mean loss, in micro-steps.

`make.make_step` gives a `pair_step.PairStep`; `losses` is what it asks the operators, `pair_values`
what it says of every pair, `reference` the model it may measure from. `likely_words` tells how far
a model has gone from what it said before.
"""

__all__ = ["gradients", "likely_words", "losses", "make", "pair_step", "pair_values", "reference"]
