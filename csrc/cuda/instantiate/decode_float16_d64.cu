#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(64, 8, Kind::kMma)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma)
LEANATTN_INSTANTIATE(64, 32, Kind::kMma)
LEANATTN_INSTANTIATE(64, 64, Kind::kMma)
LEANATTN_INSTANTIATE(64, 8, Kind::kTree)
LEANATTN_INSTANTIATE(64, 16, Kind::kTree)
LEANATTN_INSTANTIATE(64, 32, Kind::kWgmma)
LEANATTN_INSTANTIATE(64, 64, Kind::kWgmma)
LEANATTN_INSTANTIATE(64, 128, Kind::kWgmma)

}  // namespace leanattn
