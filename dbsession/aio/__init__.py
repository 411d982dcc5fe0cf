"""The asyncio counterpart of dbsession."""
