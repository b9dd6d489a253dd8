"""Token shift and learning dynamics between checkpoints: `assay report --shift`."""
