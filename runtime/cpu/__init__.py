"""The fused latent-attention kernel for processors: a library of ONNX Runtime operators, in C++.

``operators.cpp`` is the library. ``prepare_operators.h`` and ``attention.h`` are its operators, as ONNX Runtime calls
them by ``call.h`` and ``abi.h``, the few functions of its interface that they need. What they compute is in
``prepare.h``, for what comes before attention, and ``folded.h`` and ``folded_codes.h``; ``products.h``, ``vectors.h``
and ``memory.h`` are what it takes. :mod:`.library` compiles all that, and :mod:`.fused` makes a model's nodes use it.
"""
