#pragma once

// Everything that rarefy offers to C++.
#include <rarefy/config.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/mask.h>
#include <rarefy/pruning/pruner.h>
#include <rarefy/version.h>
