#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 256, 8)
LEANATTN_INSTANTIATE(__half, 256, 16)
LEANATTN_INSTANTIATE(__half, 256, 32)
LEANATTN_INSTANTIATE(__half, 256, 64)

}  // namespace leanattn
