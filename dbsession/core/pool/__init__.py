"""Who holds a pool's connections, for how long, and what is counted of it."""
