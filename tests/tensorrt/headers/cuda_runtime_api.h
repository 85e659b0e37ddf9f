// A stand-in for CUDA's header of this name: all that TensorRT's headers take from it is the type of a stream.
#pragma once

typedef struct CUstream_st* cudaStream_t;
