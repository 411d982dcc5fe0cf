"""The command `dbsession top`: the pools of every worker, in a terminal."""
