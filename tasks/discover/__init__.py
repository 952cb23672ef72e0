"""Phase 1: which kernels a model needs, which are new, and who can run them."""
