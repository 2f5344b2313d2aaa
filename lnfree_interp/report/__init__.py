"""A page about a run or a model, which needs no network."""
