// RowTensors of small tensors (weights, modulations, gates), checked on the host.
#pragma once

#include "launch.h"
#include "rows.h"

namespace vitkit {

// t as rows of its last dimension, which is that of x; nothing where it is absent.
inline RowTensor rows_of(const char* op, const char* arg, const std::optional<Tensor>& t,
                         const Tensor& x) {
  if (!t) return {nullptr, Element::f32, 0};
  STD_TORCH_CHECK(t->get_device_index() == x.get_device_index(), op, ": ", arg,
                  " must be on the device of x");
  check_size(op, arg, *t, -1, x.size(-1));
  return {t->const_data_ptr(), element_of(op, arg, *t),
          t->numel() > 0 ? row_stride(op, arg, *t) : 0};
}

}  // namespace vitkit
