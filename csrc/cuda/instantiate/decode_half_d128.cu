#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 128, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 128, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 128, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 128, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 128, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__half, 128, 64, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__half, 128, 128, Mma::kWarpgroup)

}  // namespace leanattn
