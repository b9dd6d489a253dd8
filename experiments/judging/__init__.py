"""Judges and the benchmarks that measure them: items, questions, verdicts, scores, figures."""
