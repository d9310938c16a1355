"""Training: the loop, its state, and optimizations such as CUDA graphs and caches."""
