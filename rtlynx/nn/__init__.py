"""`SparseLinear`, and what it shares with its model while it runs."""
