"""Measurements without training that are recorded and reported like runs: `assay eval experiment=<name>`."""
