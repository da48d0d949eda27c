// What a plan asks of the GPU that is to run it. Asked more than once a call: what fits depends on the
// rows of an item, and those on whether heads are paired.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cost_model.h"

namespace leanattn {

class Device {
 public:
  virtual int capability() const = 0;  // 90 for 9.0

  // Query rows that an item holds, of those that kernels exist for: enough for `rows` rows if possible,
  // but no more than the device has shared memory for. params: types and head dims.
  virtual int rows_per_item(const DecodeParams& params, int64_t rows) const = 0;

  // params: types, head dims and rows_per_item.
  virtual Machine machine(const DecodeParams& params) const = 0;

 protected:
  ~Device() = default;
};

}  // namespace leanattn
