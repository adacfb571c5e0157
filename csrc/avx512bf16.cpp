// AVX-512 with VNNI, VBMI and BF16: Zen 4, Sapphire Rapids and later. Sums of products of pairs and quads of short numbers.
#define ISA_NAME "avx512bf16"
#define ISA_TABLE kAvx512BFloat16
#define HAS_DOTS
#include "avx512.cpp"
