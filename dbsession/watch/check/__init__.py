"""The command `dbsession check`: what is configured, what the server allows, and what does not fit."""
