#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(256, 8, Kind::kMma)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma)
LEANATTN_INSTANTIATE(256, 32, Kind::kMma)
LEANATTN_INSTANTIATE(256, 64, Kind::kMma)
LEANATTN_INSTANTIATE(256, 8, Kind::kTree)
LEANATTN_INSTANTIATE(256, 16, Kind::kTree)
LEANATTN_INSTANTIATE(256, 32, Kind::kWgmma)
LEANATTN_INSTANTIATE(256, 64, Kind::kWgmma)

}  // namespace leanattn
