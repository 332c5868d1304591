#pragma once

// Everything that rarefy offers to C++.
#include <rarefy/checkpoint.h>
#include <rarefy/config.h>
#include <rarefy/distillation/loss.h>
#include <rarefy/distillation/trainer.h>
#include <rarefy/nn/add.h>
#include <rarefy/nn/cat.h>
#include <rarefy/nn/conv.h>
#include <rarefy/nn/conv_bn.h>
#include <rarefy/nn/embedding.h>
#include <rarefy/nn/linear.h>
#include <rarefy/nn/mul.h>
#include <rarefy/ops/distillation_loss.h>
#include <rarefy/ops/fake_quantize.h>
#include <rarefy/ops/inverse_std.h>
#include <rarefy/ops/mask.h>
#include <rarefy/ops/quantized_linear.h>
#include <rarefy/ops/relu.h>
#include <rarefy/pruning/pruner.h>
#include <rarefy/quantization/batch_norm.h>
#include <rarefy/quantization/fake_quantizer.h>
#include <rarefy/quantization/prepare.h>
#include <rarefy/quantization/qconfig.h>
#include <rarefy/quantization/schedule.h>
#include <rarefy/quantization/scheme.h>
#include <rarefy/version.h>
