// The kernels and the table of one instruction set. Included last, when `fma`, `dot_pairs`, ... are defined.

namespace openwork {
namespace {

#include "floats.inl"
#include "masks.inl"
#include "compress.inl"
#include "counts.inl"
#include "gemm.inl"
#include "gemv.inl"
#ifdef HAS_DOT_PRODUCT
#include "dot_product.inl"
#else
constexpr auto pack = nullptr;
constexpr auto dot_product = nullptr;
constexpr auto quantize = nullptr;
constexpr auto to_bytes = nullptr;
constexpr auto from_bytes = nullptr;
#endif

}  // namespace

extern const Kernels ISA_TABLE;
const Kernels ISA_TABLE = {ISA_NAME, kLanes,   kGemmVectors, keep, prune,       decay, count_groups, retained, compress,
                           slots,    expand,     gemm,     rows_within,  gemv, pack,        dot_product, quantize, to_bytes, from_bytes,
                           transpose, largest,   peak,       supported};

}  // namespace openwork
