// What the files of dilated_attention call of one another. Kernels are instantiated in a file
// without torch headers.
#pragma once

#include "dilated_attention.cuh"

namespace vitkit::attention {

// Null, or what went wrong. Of the maps, what is no branch is set.
const char* dilated_forward(const DilatedForward& p, const DilatedLayout& layout, Element element,
                            Stream stream);
// dk and dv, or dq.
const char* dilated_gradient(const DilatedBackward& p, const DilatedLayout& layout, bool keys,
                             Element element, Stream stream);
const char* dilated_mix(const MixParams& p, bool backward, Element element, Stream stream);

}  // namespace vitkit::attention
