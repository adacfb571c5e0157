// AVX-512 with VNNI and VBMI: Ice Lake and Tiger Lake. Sums of quads of int8; pairs of bfloat16 in two multiply-adds.
#define ISA_NAME "avx512vbmi"
#define ISA_TABLE kAvx512Vbmi
#define HAS_DOT_PRODUCT
#include "avx512.cpp"
