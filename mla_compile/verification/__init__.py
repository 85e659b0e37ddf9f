"""Check a conversion against the original model; a conversion that fails leaves no output behind.

A lossy conversion cannot be compared with the original directly, so correctness is checked in links, each of which has
an exact answer:

1. rewrite: the same graph surgery with the full rank and every rotary pair must reproduce the original;
2. decode: the converted model in chunks and token by token must equal the same model on the whole sequence;
3. lowering: ONNX Runtime must equal the converted PyTorch module; with a quantised cache, the same module with rows
   that are rounded as the cache rounds them, which alone is compared with the module that it comes from.

In float16 and bfloat16 every link is of the same computation in float32, where it is exact again, and what the type's
roundings change is compared with what they change in the original.

What is left between the original and the converted model is then the price of the smaller cache, which is reported.
"""
