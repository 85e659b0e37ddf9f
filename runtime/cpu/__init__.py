"""The fused latent-attention kernel for processors: a library of ONNX Runtime operators, in C++.

``operators.cpp`` is the library, ``prepare.h`` what comes before attention, ``folded.h`` and ``folded_codes.h`` the
attention, ``vectors.h`` what they compute with, and ``abi.h`` the few functions of ONNX Runtime that they need;
:mod:`.library` compiles them, and :mod:`.fused` makes a model's nodes use them.
"""
