// The kernels for every processor: SSE2 on x86-64, NEON on ARM. Convolutions there are PyTorch's.
#define LEVEL baseline
#define VECTOR_BYTES 16
#if defined(__x86_64__)
#define REGISTERS 16
#else
#define REGISTERS 32
#endif
#define CONVOLUTIONS 0
#include "table.h"
