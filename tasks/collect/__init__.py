"""Phase 3: workloads from dumped FlashInfer calls, and a baseline to run them with."""
