"""Phase 2: a definition for each new kernel, checked before it is staged."""
