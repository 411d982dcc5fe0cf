"""MySQL and MariaDB in asyncio: bounds on the driver's waits, the look at a connection, and KILL."""
