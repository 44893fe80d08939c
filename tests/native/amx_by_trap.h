// AMX on CPUs that have none: its instructions trap there as unknown ones, and are carried out by the signal's handler
// on tiles of the thread. Linked into a program, or preloaded into one, it begins before main.
#pragma once

#include <cstdint>

namespace amx_by_trap {

enum Instruction { ldtilecfg, sttilecfg, tilerelease, tilezero, tileload, tilestored, tdpbf16ps, INSTRUCTIONS };

// Whether AMX runs by traps here: not where the CPU has it, nor where it lacks the FMA that the sums are made of.
bool is_used();
// Whether it runs at all, by traps or on the CPU.
bool runs();
// How many of them were carried out, by all threads; never any more than 0 where the CPU does it.
int64_t count(Instruction instruction);
// Threads whose tiles are configured, those that ended so among them.
int64_t configured_threads();

}  // namespace amx_by_trap
