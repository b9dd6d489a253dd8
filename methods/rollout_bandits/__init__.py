"""Contextual rollout bandits: the context features, the online scheduler, the buffer, and the method itself."""
