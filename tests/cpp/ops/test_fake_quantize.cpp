#include <rarefy/rarefy.h>
#include <torch/torch.h>

#include "catch.h"

TEST_CASE("it links", "[ops]") { REQUIRE(!rarefy::version().empty()); }
