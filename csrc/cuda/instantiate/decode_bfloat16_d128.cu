#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 64, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__nv_bfloat16, 128, 128, Mma::kWarpgroup)

}  // namespace leanattn
