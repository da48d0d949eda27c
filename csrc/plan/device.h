// What a plan asks of the GPU that is to run it. Asked more than once a call: what fits depends on the
// rows of an item, and those on whether heads are paired.
#pragma once

#include <cstdint>

#include "core/params.h"
#include "cost_model.h"

namespace leanattn {

// Of what items are made of.
struct ItemShape {
  int rows;              // query rows that an item holds
  int tile_tokens_log2;  // of a tile
};

class Device {
 public:
  virtual int capability() const = 0;  // 90 for 9.0

  // Of those that kernels exist for: rows enough for `rows` rows if possible, but no more than the device
  // has shared memory for. params: types and head dims.
  virtual ItemShape item_shape(const DecodeParams& params, int64_t rows) const = 0;

  // params: types, head dims and rows_per_item.
  virtual Machine machine(const DecodeParams& params) const = 0;

 protected:
  ~Device() = default;
};

}  // namespace leanattn
