"""WSGI: the middleware, the response bodies that it wraps, and a request's deadline."""
