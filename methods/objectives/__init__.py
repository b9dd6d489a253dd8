"""Training objectives: how rewards become advantages, and advantages a loss."""
