// CUDA has its functions, without the language, under this name too.
#pragma once

#include "cuda_runtime.h"
