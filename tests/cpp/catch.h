#pragma once

// Catch2 with one spelling for version 2 (one header) and version 3.
#if defined(RAREFY_CATCH2_V3)
#include <catch2/catch_all.hpp>
using Catch::Approx;
#else
#include <catch2/catch.hpp>
namespace Catch::Matchers {
using Catch::Contains;
inline auto ContainsSubstring(const std::string& text) { return Catch::Contains(text); }
}  // namespace Catch::Matchers
#endif
