#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 64, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 64, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 64, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 64, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 64, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__half, 64, 64, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__half, 64, 128, Mma::kWarpgroup)

}  // namespace leanattn
