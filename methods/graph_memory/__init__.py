"""Trainable graph memory: strategies from experience, weighted by the reward that they bring (arXiv 2511.07800)."""
