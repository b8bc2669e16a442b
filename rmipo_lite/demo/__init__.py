"""The embedded default: a tiny model, preference pairs with a true reward, and a run on them."""
