"""AutoSearch: adaptive search depth by self-answering (arXiv 2604.17337)."""
