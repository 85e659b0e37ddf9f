"""Models measured and compared by their users: on text, in time, by harnesses."""
