// What the files of flash_attention call of one another. Kernels are instantiated in files without
// torch headers, which compile side by side.
#pragma once

#include "attention/bias_gradient.cuh"
#include "attention/forward.cuh"
#include "attention/structured_gradient.cuh"

namespace vitkit::attention {

using FlashForward = ForwardParams<SequenceMap, DenseTerm>;
using FlashBackward = BackwardParams<SequenceMap, DenseTerm>;
using FlashBiasGradient = BiasGradientParams<SequenceMap, DenseTerm>;

// Null, or what went wrong. `element` is that of q. A term without data takes the kernels without
// one. `rows`: tokens of the longest sequence, as far as is known.
const char* flash_forward(const FlashForward& p, Element element, int rows, Stream stream);
// For what why_not_hopper has no reason against.
const char* flash_forward_hopper(const FlashForward& p, Element element, Stream stream);
const char* flash_backward(const FlashBackward& p, Element element, int rows_q, int rows_k,
                           Stream stream);

// In what shape [copies, ...] the bias gradient's partial sums come.
BiasGradientPlan plan_flash_bias_gradient(const FlashBiasGradient& p, Element element);
const char* flash_bias_gradient(const FlashBiasGradient& p, const BiasGradientPlan& plan,
                                Element element, Stream stream);

const char* structured_forward(const StructuredForward& p, Element element, Stream stream);
const char* structured_backward(const StructuredBackward& p, Element element, Stream stream);
StructuredPlan plan_structured(const StructuredBackward& p, Element element);

}  // namespace vitkit::attention
