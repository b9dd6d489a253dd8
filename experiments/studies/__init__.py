"""Measurements without training that are recorded and reported like runs: `assay eval experiment=<name>`.

A study has `run(scores, rows)` over rollouts of the configured model, or `simulate(seed)`, for which no model is built.
Both give a frame with the columns of an evaluation and the study's own.
"""
