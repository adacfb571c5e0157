// The kernels and the table of one instruction set. Included last, when `fma`, `dot_pairs`, ... are defined.

namespace openwork {
namespace {

#include "floats.inl"
#include "masks.inl"
#include "panel.inl"
#include "rows.inl"
#ifdef HAS_DOTS
#include "dots.inl"
#else
constexpr auto pack = nullptr;
constexpr auto dots = nullptr;
constexpr auto quantize = nullptr;
#endif

}  // namespace

extern const Kernels ISA_TABLE;
const Kernels ISA_TABLE = {ISA_NAME, kLanes, kPanelVectors, keep,      prune,   decay, panel,    rows,
                           pack,     dots,   quantize,      transpose, largest, peak,  supported};

}  // namespace openwork
