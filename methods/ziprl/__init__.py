"""ZipRL: adaptive compression of the context, and hindsight response replay (arXiv 2605.28069)."""
