"""The rules that both halves obey: nothing here imports gevent or asyncio."""
