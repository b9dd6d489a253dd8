"""Engines: the one way in which assay asks a language model for text."""
