// Sums of floats whose bits do not depend on the width of a vector. Only for files that cmake/RarefyIsa.cmake compiles.
#pragma once

#include "ops/cpu/simd.h"

namespace rarefy::cpu::RAREFY_ISA {

// Sixteen elements are one step in every instruction set (one or two vectors), and lane i % 16 adds element i, so that
// sums are the same bits whatever the width of a vector. After kChunk elements the lanes go to a double.
constexpr int kStep = 16;
constexpr int kParts = kStep / Vec::size;
constexpr int64_t kChunk = 1024;

class LaneSum {
 public:
  LaneSum() { clear(); }
  void add(int part, Vec value) { lanes_[part] = lanes_[part] + value; }
  /// Adds the lanes in order to `total` and starts anew.
  void flush(double* total) {
    float values[kStep];
    for (int part = 0; part < kParts; ++part) {
      lanes_[part].store(values + part * Vec::size);
    }
    double sums[4] = {0.0, 0.0, 0.0, 0.0};  // four chains instead of one of sixteen additions
    for (int lane = 0; lane < kStep; lane += 4) {
      for (int k = 0; k < 4; ++k) {
        sums[k] += static_cast<double>(values[lane + k]);
      }
    }
    *total += (sums[0] + sums[1]) + (sums[2] + sums[3]);
    clear();
  }

 private:
  void clear() {
    for (Vec& lane : lanes_) {
      lane = Vec(0.0f);
    }
  }
  Vec lanes_[kParts];
};

/// A sum in the same lanes, which are added in pairs, in double: element i of a stretch goes to lane i % kStep.
class Lanes {
 public:
  Lanes() {
    for (Vec& part : parts_) part = Vec(0.0f);
  }
  /// `first`: the position of value's first lane in the stretch, a multiple of Vec::size.
  void add(int first, Vec value) {
    Vec& part = parts_[first % kStep / Vec::size];
    part = part + value;
  }
  double sum() const {
    float lanes[kStep];
    for (int i = 0; i < kStep; i += Vec::size) parts_[i / Vec::size].store(lanes + i);
    double wide[kStep];
    for (int i = 0; i < kStep; ++i) wide[i] = static_cast<double>(lanes[i]);
    for (int width = kStep / 2; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) wide[i] += wide[i + width];
    }
    return wide[0];
  }

 private:
  Vec parts_[kStep / Vec::size];
};

}  // namespace rarefy::cpu::RAREFY_ISA
