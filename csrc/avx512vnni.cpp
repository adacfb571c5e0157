// AVX-512 with VNNI: Cascade Lake, Ice Lake and later. One instruction multiplies pairs of int16 and adds.
#define ISA_NAME "avx512vnni"
#define ISA_TABLE kAvx512Vnni
#include "avx512.cpp"
