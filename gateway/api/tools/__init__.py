"""Tools: what clients declare and choose, how each family of models is told of them, writes its calls, and is read."""
