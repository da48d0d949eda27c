#include "cuda/launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(64, 8, Kind::kMma, Float16, MaskedFeatures<true>)
LEANATTN_INSTANTIATE(64, 16, Kind::kMma, Float16, MaskedFeatures<true>)

LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(128, 8, Kind::kMma, Float16, MaskedFeatures<true>)
LEANATTN_INSTANTIATE(128, 16, Kind::kMma, Float16, MaskedFeatures<true>)

LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, MaskedFeatures<false>)
LEANATTN_INSTANTIATE(256, 8, Kind::kMma, Float16, MaskedFeatures<true>)
LEANATTN_INSTANTIATE(256, 16, Kind::kMma, Float16, MaskedFeatures<true>)

}  // namespace leanattn
