"""How a run ended, from evidence alone. Pure: the engine and the client judge with the same functions."""
