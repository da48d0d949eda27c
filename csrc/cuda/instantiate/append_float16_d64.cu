#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, AppendFeatures<true, false>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, AppendFeatures<true, false>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, AppendFeatures<true, true>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, AppendFeatures<true, true>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, AppendFeatures<false, false>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, AppendFeatures<false, false>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, AppendFeatures<false, true>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, AppendFeatures<false, true>)

}  // namespace leanattn
