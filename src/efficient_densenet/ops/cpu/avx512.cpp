// The kernels with AVX-512.
#if defined(__x86_64__)
#define LEVEL avx512
#define TARGET "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define VECTOR_BYTES 64
#define REGISTERS 32
#define CONVOLUTIONS 1
#include "table.h"
#endif
