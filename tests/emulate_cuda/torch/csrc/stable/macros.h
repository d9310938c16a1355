// Replaces torch's header, whose STD_CUDA_CHECK in torch 2.11 needs CUDA even without USE_CUDA. The emulator has no
// errors.
#pragma once

#include_next <torch/csrc/stable/macros.h>

#undef STD_CUDA_CHECK
#define STD_CUDA_CHECK(call) ((void)(call))
