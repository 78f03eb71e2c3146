"""The kinds of runs that a sweep can have at its points. `shadowmmu.experiments.point` is their table."""
