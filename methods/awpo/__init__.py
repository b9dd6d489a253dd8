"""AWPO (arXiv 2512.19126): the gate and the weights, the judge of the thinking, the bound of the theory, the method."""
