"""Looking inside: what this process does with its databases, for people and for what scrapes it."""
