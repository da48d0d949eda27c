#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 8)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 16)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 32)
LEANATTN_INSTANTIATE(__nv_bfloat16, 256, 64)

}  // namespace leanattn
