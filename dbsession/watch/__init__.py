"""What looks at the databases and at this process from the outside, for those who run it."""
