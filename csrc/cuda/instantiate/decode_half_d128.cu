#include "../launch_kernel.h"

namespace leanattn {

LEANATTN_INSTANTIATE(__half, 128, 8)
LEANATTN_INSTANTIATE(__half, 128, 16)
LEANATTN_INSTANTIATE(__half, 128, 32)
LEANATTN_INSTANTIATE(__half, 128, 64)

}  // namespace leanattn
