#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 8)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 16)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 32)
LEANATTN_INSTANTIATE(__nv_bfloat16, 64, 64)

}  // namespace leanattn
