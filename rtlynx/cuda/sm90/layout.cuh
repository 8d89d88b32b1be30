// Checks that the host packs `Parameters` as they are here. It passes the place and size of each of its fields as
// PARAMETER_FIELDS, and the size of the whole as PARAMETER_BYTES (rtlynx/cuda/layout.py).
#pragma once

// offsetof by what NVRTC's front end calls it: 13.0 has no __builtin_offsetof.
#define FIELD(path, offset, bytes)                                                                         \
    static_assert(__INTADDR__(&static_cast<Parameters*>(nullptr)->path) == offset, #path " is elsewhere"); \
    static_assert(sizeof(static_cast<Parameters*>(nullptr)->path) == bytes, #path " has another size");
PARAMETER_FIELDS
#undef FIELD
static_assert(sizeof(Parameters) == PARAMETER_BYTES, "the host packs other fields");
