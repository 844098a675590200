#include "dilated_branches.h"

#include <algorithm>

namespace vitkit::cpu {

DilatedLayout::DilatedLayout(const char* op, const AttentionInputs& in,
                             const std::vector<int64_t>& lengths,
                             const std::vector<int64_t>& ratios, bool torchscale) {
  STD_TORCH_CHECK(lengths.size() == ratios.size() && !lengths.empty(), op,
                  ": dilation_ratios must have one ratio per segment length, got ", ratios.size(),
                  " for ", lengths.size());
  const int64_t tokens = in.nq;
  for (size_t i = 0; i < lengths.size(); ++i) {
    STD_TORCH_CHECK(lengths[i] >= 1 && ratios[i] >= 1, op,
                    ": segment_lengths and dilation_ratios must be at least 1, got ", lengths[i],
                    " and ", ratios[i]);
    DilatedBranch b{};
    b.length = std::min(lengths[i], tokens);
    // Beyond the tokens and the heads, a larger ratio changes nothing but may overflow.
    b.ratio = std::min(ratios[i], std::max(tokens, in.heads));
    b.segments = (tokens + b.length - 1) / b.length;
    b.slots = (b.length + b.ratio - 1) / b.ratio;
    b.pitch = torchscale ? b.slots * b.ratio : b.length;
    b.heads_per_phase = (in.heads + b.ratio - 1) / b.ratio;
    const int64_t last = std::min(b.segments, (tokens + b.pitch - 1) / b.pitch) - 1;
    const int64_t rest = tokens - last * b.pitch;
    b.first_row = row_count;
    b.rows = last * b.slots + std::min(b.slots, (rest + b.ratio - 1) / b.ratio);
    row_count += b.rows;
    branches.push_back(b);
  }
}

std::vector<HeadGroup> head_groups(const AttentionInputs& in, int64_t most) {
  std::vector<HeadGroup> groups;
  if (most >= in.heads) {
    const int64_t batches = most / in.heads;
    for (int64_t b = 0; b < in.batch; b += batches)
      groups.push_back({b, std::min(batches, in.batch - b), 0, in.heads});
    return groups;
  }
  const int64_t parts = (in.heads + most - 1) / std::max<int64_t>(most, 1);
  const int64_t heads = (in.heads + parts - 1) / parts;
  for (int64_t b = 0; b < in.batch; ++b)
    for (int64_t h = 0; h < in.heads; h += heads)
      groups.push_back({b, 1, h, std::min(heads, in.heads - h)});
  return groups;
}

}  // namespace vitkit::cpu
