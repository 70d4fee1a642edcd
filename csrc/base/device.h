// RR_HOST_DEVICE marks a function that runs on the CPU and inside CUDA kernels.
// It exists so that shared headers need no CUDA header: outside nvcc the mark is empty.
#pragma once

#ifdef __CUDACC__
#define RR_HOST_DEVICE __host__ __device__
#else
#define RR_HOST_DEVICE
#endif
