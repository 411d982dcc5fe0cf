"""What the tests stand on: servers, proxies and fresh interpreters, each ended by whoever started it."""
