"""PostgreSQL in asyncio: psycopg's connections, and asyncpg's, whose waits are bounded and whose statements end with
their tasks."""
