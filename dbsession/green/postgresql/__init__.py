"""psycopg 3 under gevent: how its connections wait, what the pool cleans, and what ends an abandoned statement."""
