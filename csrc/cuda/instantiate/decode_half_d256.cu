#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 256, 8, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 256, 16, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 256, 32, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 256, 64, Mma::kWarp)
LEANATTN_INSTANTIATE(__half, 256, 32, Mma::kWarpgroup)
LEANATTN_INSTANTIATE(__half, 256, 64, Mma::kWarpgroup)

}  // namespace leanattn
