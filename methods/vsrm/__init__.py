"""VSRM: verifiable stepwise rewards, and the measures of overthinking that they come from."""
