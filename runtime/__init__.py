"""Runtime: all that a converted model needs in order to run, and nothing of the compiler."""

# From the root of the tree this folder can also be found as `runtime`, which would make a second copy of every class.
if __name__ != "mla_compile.runtime":
    raise ImportError(f"{__name__!r} is not a package of its own; import mla_compile.runtime instead.")
