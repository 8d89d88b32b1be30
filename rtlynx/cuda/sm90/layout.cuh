// Checks that the host packs `Parameters` as they are here. It passes the place and size of each of its fields as
// PARAMETER_FIELDS, and the size of the whole as PARAMETER_BYTES (rtlynx/cuda/layout.py).
#pragma once

#define FIELD(path, offset, bytes)                                                               \
    static_assert(__builtin_offsetof(Parameters, path) == offset, #path " is packed elsewhere"); \
    static_assert(sizeof(static_cast<Parameters*>(nullptr)->path) == bytes, #path " is packed in other bytes");
PARAMETER_FIELDS
#undef FIELD
static_assert(sizeof(Parameters) == PARAMETER_BYTES, "the host packs other fields");
