// What finds a byte that is not as it was written.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rarefy {

/// CRC-32 (IEEE 802.3), continuing from `previous`.
uint32_t checksum(const void* data, size_t size, uint32_t previous = 0);

}  // namespace rarefy
