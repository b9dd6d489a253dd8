"""CDRRM (arXiv 2603.08035): rubrics from the contrast of two diagnoses, and a judge that follows them."""
