// The kernels with AVX2 and FMA.
#if defined(__x86_64__)
#define LEVEL avx2
#define TARGET "avx2,fma"
#define VECTOR_BYTES 32
#define REGISTERS 16
#define CONVOLUTIONS 1
#include "table.h"
#endif
