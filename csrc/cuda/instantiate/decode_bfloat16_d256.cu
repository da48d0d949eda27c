#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 64, Mma::kWarpgroup)

}  // namespace leanattn
