#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 576, 16, Kind::kMma)
LEANATTN_INSTANTIATE(__nv_bfloat16, 576, 16, Kind::kTree)
LEANATTN_INSTANTIATE(__nv_bfloat16, 576, 64, Kind::kWgmma)

}  // namespace leanattn
