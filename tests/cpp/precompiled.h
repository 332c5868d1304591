#pragma once
#include <torch/torch.h>

#include "catch.h"
