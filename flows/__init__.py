"""What runs, in what order, and what waits for what: Prefect flows, and the command line."""
