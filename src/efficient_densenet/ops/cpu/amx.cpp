// The kernels for bfloat16 with the tile registers of AMX, if the compiler knows these.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define LEVEL amx
#define TARGET "avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma"
#define VECTOR_BYTES 64
#define REGISTERS 32
#define PAIRS 1
#define TILES 1
#define CONVOLUTIONS 1
#include "table.h"
#endif
