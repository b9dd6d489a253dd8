"""Local-life search: worlds of merchants, multi-hop questions over them, and readers of the public data."""
