"""The command `dbsession dashboard`: the pools of every worker, as a page in a browser."""
