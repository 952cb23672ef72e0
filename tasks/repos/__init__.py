"""Phase 0: the source repositories, at known commits."""
