#pragma once

// Everything that rarefy offers to C++.
#include <rarefy/config.h>
#include <rarefy/distillation/loss.h>
#include <rarefy/distillation/trainer.h>
#include <rarefy/ops/distillation_loss.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/version.h>
