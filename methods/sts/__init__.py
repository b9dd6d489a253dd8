"""STS: the SAE-based transferability score (arXiv 2603.02908)."""
