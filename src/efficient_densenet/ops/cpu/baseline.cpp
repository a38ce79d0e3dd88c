// The kernels for every processor: SSE2 on x86-64, where convolutions are PyTorch's, and NEON on ARM, where ours are
// compiled and tested in an emulator, but were never measured, so that PyTorch's run there too.
#define LEVEL baseline
#define VECTOR_BYTES 16
#if defined(__x86_64__)
#define REGISTERS 16
#define CONVOLUTIONS 0
#else
#define REGISTERS 32
#define CONVOLUTIONS 1
#endif
#include "table.h"
