#include "checksum.h"

#include <array>
#include <bit>
#include <cstring>

static_assert(std::endian::native == std::endian::little, "eight bytes are read as two numbers");

namespace rarefy {
namespace {

using Tables = std::array<std::array<uint32_t, 256>, 8>;

Tables make_tables() {
  Tables tables{};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) {
      value = (value >> 1) ^ ((value & 1) != 0 ? 0xedb88320u : 0u);
    }
    tables[0][i] = value;
  }
  for (uint32_t i = 0; i < 256; ++i) {
    for (size_t k = 1; k < 8; ++k) {
      tables[k][i] = (tables[k - 1][i] >> 8) ^ tables[0][tables[k - 1][i] & 0xff];
    }
  }
  return tables;
}

}  // namespace

uint32_t checksum(const void* data, size_t size, uint32_t previous) {
  static const Tables tables = make_tables();
  const auto* in = static_cast<const uint8_t*>(data);
  uint32_t crc = ~previous;
  for (; size >= 8; size -= 8, in += 8) {  // eight bytes at a time, one table for each
    uint32_t low, high;
    std::memcpy(&low, in, 4);
    std::memcpy(&high, in + 4, 4);
    low ^= crc;
    crc = tables[7][low & 0xff] ^ tables[6][low >> 8 & 0xff] ^ tables[5][low >> 16 & 0xff] ^ tables[4][low >> 24] ^
          tables[3][high & 0xff] ^ tables[2][high >> 8 & 0xff] ^ tables[1][high >> 16 & 0xff] ^ tables[0][high >> 24];
  }
  for (; size > 0; --size, ++in) {
    crc = (crc >> 8) ^ tables[0][(crc ^ *in) & 0xff];
  }
  return ~crc;
}

}  // namespace rarefy
