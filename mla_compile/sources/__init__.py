"""Any source of a model becomes a program."""
