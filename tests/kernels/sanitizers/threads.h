// See threads.cpp.
#pragma once

// How many parallel regions there were of more than one thread.
long parallel_regions();
