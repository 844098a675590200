// What a row of places says of a packed call's token: what a dense call computes.
#pragma once

namespace vitkit {

enum PlaceColumn {
  kOrigin,
  kChannelStride,
  kRowStride,
  kRows,
  kColumns,
  kPositionRow,
  kPlaceColumns
};

}  // namespace vitkit
