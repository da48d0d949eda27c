#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(128, 8, Kind::kMma)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma)
LEANATTN_INSTANTIATE(128, 32, Kind::kMma)
LEANATTN_INSTANTIATE(128, 64, Kind::kMma)
LEANATTN_INSTANTIATE(128, 8, Kind::kTree)
LEANATTN_INSTANTIATE(128, 16, Kind::kTree)
LEANATTN_INSTANTIATE(128, 32, Kind::kWgmma)
LEANATTN_INSTANTIATE(128, 64, Kind::kWgmma)
LEANATTN_INSTANTIATE(128, 128, Kind::kWgmma)

}  // namespace leanattn
