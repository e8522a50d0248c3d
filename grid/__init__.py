"""The experiment: which combinations of techniques are trained, how, where, and what is recorded."""

from grid import surroundings

surroundings.make_do()
