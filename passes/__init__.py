"""Passes: everything that reads or changes an exported graph, one pass to a file."""

# From the root of the tree this folder can also be found as `passes`, which would make a second copy of every class.
if __name__ != "mla_compile.passes":
    raise ImportError(f"{__name__!r} is not a package of its own; import mla_compile.passes instead.")
