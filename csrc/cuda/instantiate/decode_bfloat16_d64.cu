#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 64, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 128, Mma::kWarpgroup)

}  // namespace leanattn
