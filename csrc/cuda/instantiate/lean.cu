#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, LeanFeatures<false, true>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, LeanFeatures<false, true>)

LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, LeanFeatures<false, true>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, LeanFeatures<false, true>)

LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, LeanFeatures<false, false>)
LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, LeanFeatures<false, true>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, LeanFeatures<false, true>)

LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float8, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float8, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float8, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float8, LeanFeatures<true, true>)

LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float8, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float8, LeanFeatures<true, false>)
LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float8, LeanFeatures<true, true>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float8, LeanFeatures<true, true>)

}  // namespace leanattn
