#include "../core/arithmetic.h"
#include "../core/geometry.h"
#include "../core/dtype.h"
