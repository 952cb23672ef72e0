"""Phase 4: pull requests and issues, each exactly once."""
