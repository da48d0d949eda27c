#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(256, 32, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(256, 64, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(256, 8, Kind::kTree, Float8)
LEANATTN_INSTANTIATE(256, 16, Kind::kTree, Float8)

}  // namespace leanattn
