#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 576, 16, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(__half, 576, 16, Kind::kTree, Float8)

}  // namespace leanattn
