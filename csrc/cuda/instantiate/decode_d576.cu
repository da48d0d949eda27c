#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(576, 16, Kind::kMma)
LEANATTN_INSTANTIATE(576, 16, Kind::kTree)
LEANATTN_INSTANTIATE(576, 16, Kind::kWgmmaKeys)
LEANATTN_INSTANTIATE(576, 32, Kind::kWgmmaKeys)
LEANATTN_INSTANTIATE(576, 64, Kind::kWgmma)

LEANATTN_INSTANTIATE(576, 16, Kind::kWgmmaKeys, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(576, 16, Kind::kWgmmaKeys, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(576, 64, Kind::kWgmma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(576, 64, Kind::kWgmma, Float16, LeanFeatures<true, true>)

LEANATTN_INSTANTIATE(576, 16, Kind::kMma, Float8)
LEANATTN_INSTANTIATE(576, 16, Kind::kTree, Float8)

}  // namespace leanattn
