"""TAPO: tool-aware policy optimisation via credit transfer (arXiv 2606.05784)."""
