"""The kinds of work of a server, each beside the time in which the memory gives up its bytes."""
