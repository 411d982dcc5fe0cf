"""The inspection socket: each worker serves the snapshot of its pools, and a reader collects them."""
