// What the CPU can do, asked once: kernels choose their instructions at run time, so one build serves every machine.
#pragma once

#include <map>
#include <string>

namespace vitfast {

// Name of the instruction set (as in Linux's /proc/cpuinfo) -> whether the CPU and the system let us use it.
std::map<std::string, bool> cpu_features();

// Why the tiles of AMX, which the CPU has, cannot be used; "" where they can, or where it has none.
std::string why_no_tiles();

}  // namespace vitfast
