// Includes the file PK_BODY once for each instruction set, in the namespaces baseline, avx2 and avx512; after
// `#define PK_WITH_DOT_BF16` in avx512_bf16 too. What the file sees: vector.h, and PK_DOT_BF16 (0 or 1).
// Included once by a source file, inside its own namespace, after isa.h.

#define PK_DOT_BF16 0
#define PK_ISA 0
#define PK_WIDTH 4
namespace baseline {
#include PK_BODY
}
#undef PK_ISA
#undef PK_WIDTH

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#define PK_ISA 2
#define PK_WIDTH 8
namespace avx2 {
#include PK_BODY
}
#undef PK_ISA
#undef PK_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#define PK_ISA 5
#define PK_WIDTH 16
namespace avx512 {
#include PK_BODY
}
#if defined(PK_WITH_DOT_BF16)
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma,f16c")
#endif
#undef PK_DOT_BF16
#define PK_DOT_BF16 1
namespace avx512_bf16 {
#include PK_BODY
}
#endif  // PK_WITH_DOT_BF16
#undef PK_ISA
#undef PK_WIDTH
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

#undef PK_DOT_BF16
#undef PK_BODY
